"""Compares the GPU kernels for several groups with the copier for host memory. Triton's interpreter runs the kernels on
host memory.
"""

from __future__ import annotations

import importlib
import mmap
import os

import pytest
import torch
from test_parts import CHUNK, side, tables

from pd_sidecar.kv.copier import piece_of
from pd_sidecar.kv.layout import LayoutError
from pd_sidecar.kv.parts import GroupPart, Parts
from pd_sidecar.kv.parts_copy import PartsCopier
from pd_sidecar.kv.plan import Plan
from pd_sidecar.kv.states import States

pytest.importorskip("triton", reason="no Triton: the GPU's kernels are not tested")


@pytest.fixture(scope="module")
def mover():
    """Returns the class of the kernels for all groups. Triton's interpreter runs the kernels."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        module = importlib.import_module("pd_sidecar.kv.parts_mover")
        for kernel in ("triton_copy._move", "triton_states._move_states"):
            name, function = kernel.split(".")
            loaded = importlib.import_module(f"pd_sidecar.kv.{name}")
            if "Interpreted" not in type(getattr(loaded, function)).__name__:
                pytest.skip("Triton was loaded before, without its interpreter")
        yield module.PartsMover
    finally:
        del os.environ["TRITON_INTERPRET"]


def with_states(parts: Parts, layers: tuple[tuple[torch.Tensor, ...], ...]) -> Parts:
    names = tuple(f"state.{index}" for index in range(len(layers)))
    return Parts((*parts.parts[:-1], GroupPart(2, "state", States(layers, names))))


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize(("tokens", "have"), [(5, 0), (64, 0), (70, 5), (70, 33)])
def test_they_do_what_the_hosts_copier_does(mover, tokens, have, channels_first):
    torch.manual_seed(3)
    ours = side(4, channels_first=channels_first)
    plan = Plan(ours.groups, CHUNK, tokens=tokens, have=have)
    table = tables(4, tokens, plan.first_token(ours.groups[1]))
    pieces = [piece_of(part, chunk, table[part.group]) for chunk in plan.wanted() for part in plan.parts(chunk)]
    host = mmap.mmap(-1, plan.slot_bytes * plan.chunks)
    PartsCopier(ours, host, plan.slot_bytes).gather(pieces)
    expect = torch.frombuffer(host, dtype=torch.uint8)
    found = torch.zeros_like(expect)
    kernels = mover(ours, plan.slot_bytes)
    kernels.move(kernels.plan(pieces), found, gather=True)
    assert expect.any()
    assert torch.equal(found, expect)
    # Then move the chunks into other pages with blocks of another size, and gather from these pages again.
    theirs = side(16, channels_first=not channels_first)
    others = tables(16, tokens, plan.first_token(ours.groups[1]))
    pieces = [piece_of(part, chunk, others[part.group]) for chunk in plan.wanted() for part in plan.parts(chunk)]
    kernels = mover(theirs, plan.slot_bytes)
    kernels.move(kernels.plan(pieces), found, gather=False)
    found.zero_()
    PartsCopier(theirs, host, plan.slot_bytes).gather(pieces)
    kernels.move(kernels.plan(pieces), found, gather=True)
    assert torch.equal(found, expect)
    assert torch.equal(torch.frombuffer(host, dtype=torch.uint8), expect)


def test_states_of_several_dtypes_lie_in_several_slots(mover):
    """The tensors are parts of one larger tensor, as vLLM makes them, so that their blocks lie apart."""
    torch.manual_seed(4)
    layers = []
    for _ in range(3):
        whole = torch.randn(10, 40)
        conv = whole[:, :9].to(torch.bfloat16).view(10, 3, 3).transpose(1, 2)
        layers.append((conv, whole[:, 10:40].view(10, 5, 6)))
    # Nine elements of two bytes leave the second tensor at no multiple of four bytes, so its elements are copied in
    # halves.
    parts = with_states(side(4), tuple(layers))
    plan = Plan(parts.groups, 1, tokens=3, have=0)
    assert plan.state_chunks > 1
    table = tables(4, 3, 0)
    table[2] = torch.tensor([7])
    pieces = [piece_of(part, chunk, table[part.group]) for chunk in plan.wanted() for part in plan.parts(chunk)]
    host = mmap.mmap(-1, plan.slot_bytes * plan.chunks)
    PartsCopier(parts, host, plan.slot_bytes).gather(pieces)
    found = torch.zeros(len(host), dtype=torch.uint8)
    kernels = mover(parts, plan.slot_bytes)
    kernels.move(kernels.plan(pieces), found, gather=True)
    assert torch.equal(found, torch.frombuffer(host, dtype=torch.uint8))
    assert found[plan.slot_bytes * plan.token_chunks :].any()


def test_a_freed_block_is_an_error(mover):
    ours = side(4)
    plan = Plan(ours.groups, CHUNK, tokens=30, have=0)
    kernels = mover(ours, plan.slot_bytes)
    table = torch.zeros(8, dtype=torch.int64)
    for part in [*plan.parts(0), *plan.parts(plan.token_chunks)]:
        with pytest.raises(LayoutError, match="block"):
            kernels.plan([piece_of(part, 0, table)])
