"""The groups of a layout: what both sides compare, and moves between pages and slots."""

from __future__ import annotations

import mmap
from dataclasses import replace

import pytest
import torch
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from pd_sidecar.kv.copier import piece_of
from pd_sidecar.kv.layout import Hint, LayoutError, geometry
from pd_sidecar.kv.parts import GroupPart, Parts, _check_alignment, without_draft
from pd_sidecar.kv.parts_copy import PartsCopier
from pd_sidecar.kv.plan import Plan
from pd_sidecar.kv.states import States
from pd_sidecar.kv.states import states as states_of

CHUNK, WINDOW, BLOCKS = 32, 24, 40


def pages(prefix: str, layers: int, block: int, *, heads: int = 2, dtype: torch.dtype = torch.float32):
    hint = Hint(BLOCKS, block, heads, 4, mla=False)
    tensors = {f"{prefix}.{i}": torch.randn(BLOCKS, heads, block, 8).to(dtype) for i in range(layers)}
    return geometry(tensors, hint)


def states(*, channels_first: bool) -> States:
    layers = []
    for _ in range(2):
        conv = torch.randn(BLOCKS, 6, 3) if channels_first else torch.randn(BLOCKS, 3, 6)
        layers.append((conv.transpose(1, 2) if channels_first else conv, torch.randn(BLOCKS, 2, 5)))
    return States(tuple(layers), ("state.0", "state.1"))


def side(block: int, *, channels_first: bool = False) -> Parts:
    return Parts(
        (
            GroupPart(0, "full", pages("full", 2, block)),
            GroupPart(1, "window", pages("window", 3, block, heads=1), WINDOW),
            GroupPart(2, "state", states(channels_first=channels_first)),
        )
    )


def tables(block: int, tokens: int, first: int) -> list[torch.Tensor]:
    """Returns a block table for each group. In the window's table the blocks before token `first` are null."""
    count = -(-tokens // block)
    shuffled = torch.randperm(BLOCKS - 1) + 1
    window = shuffled[count : 2 * count].clone()
    window[: first // block] = 0
    return [shuffled[:count], window, shuffled[-1:]]


def value(part: GroupPart, table: torch.Tensor, token: int) -> torch.Tensor:
    """Returns the KV of one token, read with the engine's own view of its pages."""
    rows = []
    for page in part.pages.layers:
        block = table[token // page.tokens]
        rows.append(page.tensor[block, :, token % page.tokens])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("tokens", "have"), [(n, h) for n in [*range(1, 20), 31, 32, 33, 63, 64, 65, 70] for h in (0, 5) if h < n]
)
def test_windows_and_states_arrive_in_blocks_of_another_size(tokens, have):
    ours, theirs = side(4), side(16, channels_first=True)
    assert ours.layout("m", CHUNK) == theirs.layout("m", CHUNK)
    plan = Plan(ours.groups, CHUNK, tokens=tokens, have=have)
    buffer = mmap.mmap(-1, plan.slot_bytes * plan.chunks)
    sender, receiver = (PartsCopier(parts, buffer, plan.slot_bytes) for parts in (ours, theirs))
    first = plan.first_token(ours.groups[1])
    source, target = tables(4, tokens, first), tables(16, tokens, first)
    before = [value(theirs.parts[0], target[0], token).clone() for token in range(have)]
    for copy, own in ((sender.gather, source), (receiver.scatter, target)):
        for chunk in plan.wanted():
            copy([piece_of(part, chunk, own[part.group]) for part in plan.parts(chunk)])
    for token in range(have, tokens):
        assert torch.equal(value(ours.parts[0], source[0], token), value(theirs.parts[0], target[0], token))
    for token in range(first, tokens):
        assert torch.equal(value(ours.parts[1], source[1], token), value(theirs.parts[1], target[1], token))
    for token, kept in enumerate(before):
        assert torch.equal(value(theirs.parts[0], target[0], token), kept)
    for mine, other in zip(ours.parts[2].pages.layers, theirs.parts[2].pages.layers, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert torch.equal(a[source[2][0]], b[target[2][0]])


def test_a_freed_block_is_an_error_and_is_not_touched():
    ours = side(4)
    plan = Plan(ours.groups, CHUNK, tokens=30, have=0)
    copier = PartsCopier(ours, mmap.mmap(-1, plan.slot_bytes * plan.chunks), plan.slot_bytes)
    table = torch.zeros(8, dtype=torch.int64)
    for part in [*plan.parts(0), *plan.parts(plan.token_chunks)]:
        for copy in (copier.gather, copier.scatter):
            with pytest.raises(LayoutError, match="block"):
                copy([piece_of(part, 0, table)])


def test_layers_that_are_divided_into_groups_differently_refuse_each_other():
    ours = side(4)
    names = ours.parts[0].pages.names
    swapped = replace(ours.parts[0], pages=replace(ours.parts[0].pages, names=names[::-1]))
    other = Parts((swapped, *ours.parts[1:]))
    assert ours.layout("m", CHUNK).groups == other.layout("m", CHUNK).groups
    assert ours.layout("m", CHUNK).quantization != other.layout("m", CHUNK).quantization


def test_groups_that_would_begin_at_an_odd_byte_are_refused():
    bytes_ = GroupPart(0, "full", pages("bytes", 1, 4, heads=1, dtype=torch.uint8))
    _check_alignment([bytes_, GroupPart(1, "full", pages("floats", 1, 4))])
    odd = replace(
        bytes_, pages=replace(bytes_.pages, layers=tuple(replace(p, head_size=3) for p in bytes_.pages.layers))
    )
    with pytest.raises(LayoutError, match="6 bytes of a token"):
        _check_alignment([odd, GroupPart(1, "full", pages("floats", 1, 4))])


def test_states_of_kinds_that_are_not_tested_or_that_vllm_itself_spoils_are_refused():
    def spec(kind, mode):
        shapes, dtypes = ((3, 6), (2, 5)), (torch.float32, torch.float32)
        return MambaSpec(16, shapes, dtypes, mamba_type=MambaAttentionBackendEnum[kind], mamba_cache_mode=mode)

    tensors = {"state.0": [torch.zeros(BLOCKS, 3, 6), torch.zeros(BLOCKS, 2, 5)]}
    for kind, mode in (("GDN_ATTN", "none"), ("GDN_ATTN", "align"), ("MAMBA2", "none")):
        assert states_of(tensors, spec(kind, mode)).names == ("state.0",)
    with pytest.raises(LayoutError, match="--no-enable-prefix-caching"):
        states_of(tensors, spec("MAMBA2", "align"))
    with pytest.raises(LayoutError, match="kind MAMBA1"):
        states_of(tensors, spec("MAMBA1", "none"))
    with pytest.raises(LayoutError, match="speculative decoding"):
        states_of(tensors, replace(spec("MAMBA2", "none"), num_speculative_blocks=2))


def test_the_layers_of_a_draft_are_those_after_the_models_own():
    own = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
    drafts = ["model.layers.2.self_attn.attn", "layers.12.self_attn.attn", "mtp.layers.0.self_attn.attn"]
    assert list(without_draft(dict.fromkeys([*own, *drafts]), 2)) == own
