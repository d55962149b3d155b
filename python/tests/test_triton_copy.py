"""Compares the GPU kernel with the copier for host memory. Triton's interpreter runs the kernel on host memory."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from test_layout import (
    BLOCKS,
    CASES,
    CHUNK,
    LAYERS,
    Side,
    bits,
    chunk_span,
    columns,
    memory,
    pieces,
    stored,
)

from pd_sidecar.kv.copier import Piece
from pd_sidecar.kv.layout import LayoutError

pytest.importorskip("triton", reason="no Triton: the GPU's kernel is not tested")


@pytest.fixture(scope="module")
def fused():
    """Returns the module, with its kernel run by Triton's interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        module = importlib.import_module("pd_sidecar.kv.triton_copy")
        if "Interpreted" not in type(module._move).__name__:
            pytest.skip("Triton was loaded before, without its interpreter")
        yield module
    finally:
        del os.environ["TRITON_INTERPRET"]


def move(fused, side, parts, buffer, *, gather):
    mover = fused.Mover(side.pages, side.slot_bytes)
    mover.move(fused.Plan(side.pages, parts), buffer, gather=gather)


def buffers():
    mapped = memory()
    return mapped, torch.frombuffer(mapped, dtype=torch.uint8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_it_does_what_the_hosts_copier_does(fused, case, dtype):
    torch.manual_seed(2)
    (host_map, host), (_, device) = buffers(), buffers()
    side = Side(case, 16, host_map, dtype)
    tokens, slots = 3 * CHUNK + 17, [5, 6, 2, 9]
    parts = pieces(side, tokens, 0, 0, slots)
    side.copier.gather(parts)
    move(fused, side, parts, device, gather=True)
    assert torch.equal(host, device)
    assert device.any()
    # Then move the chunks into pages of another size, after a local prefix that no piece may change.
    target = Side(case, 32, host_map, dtype)
    have = CHUNK + 40
    before = target.read(tokens).clone()
    move(fused, target, pieces(target, tokens, 0, have, slots), device, gather=False)
    after = target.read(tokens)
    assert torch.equal(bits(after[:, :, :have]), bits(before[:, :, :have]))
    assert torch.equal(bits(after[:, :, have:]), bits(side.read(tokens)[:, :, have:]))


@pytest.mark.parametrize("case", CASES)
def test_ranges_of_layers_are_the_whole_and_nothing_before_its_range(fused, case):
    mapped, whole = buffers()
    _, parted = buffers()
    side = Side(case, 16, mapped, torch.bfloat16)
    parts = pieces(side, CHUNK + 17, 0, 0, [5, 2])
    move(fused, side, parts, whole, gather=True)
    mover, plan = fused.Mover(side.pages, side.slot_bytes), fused.Plan(side.pages, parts)
    planes, at = side.pages.first.planes, 5 * side.slot_bytes

    def slot(buffer):
        return buffer[at : at + side.slot_bytes].view(planes, LAYERS, -1)

    for below in range(1, LAYERS + 1):
        mover.move(plan, parted, gather=True, layers=(below - 1, below))
        assert torch.equal(slot(parted)[:, :below], slot(whole)[:, :below])
        assert not slot(parted)[:, below:].any()
    assert torch.equal(parted, whole)


def test_several_requests_in_one_launch_and_blocks_of_several_of_the_tensor(fused):
    mapped, device = buffers()
    side = Side("0.24 NHD", 64, mapped, torch.float32, kernel_tokens=16)
    assert side.hint.num_blocks == BLOCKS // 4
    other = Piece(7, side.table.flip(0), (0, 50), (0, 50))
    parts = [*pieces(side, CHUNK + 30, 40, 40, [3, 1]), other]
    move(fused, side, parts, device, gather=True)
    found = device.clone()
    device.zero_()
    side.copier.gather(parts)
    assert torch.equal(found, device)
    assert parts[0].packed == chunk_span(0, CHUNK + 30, 40, CHUNK)


def test_pages_whose_inside_is_not_their_shape(fused):
    mapped, device = buffers()
    side = Side("0.32 HND", 32, mapped, torch.float32, writer=columns)
    values = torch.randn(2, LAYERS, CHUNK, side.pages.first.heads * 16)
    stored(columns, side, values)
    move(fused, side, pieces(side, CHUNK, 0, 0, [2]), device, gather=True)
    at = 2 * side.slot_bytes
    chunk = device[at : at + side.slot_bytes].view(torch.float32)
    assert torch.equal(chunk.view(values.shape), values)


def test_layers_that_differ_inside_are_moved_one_kind_after_the_other(fused):
    mapped, device = buffers()
    side = Side("0.24 NHD", 16, mapped, torch.float32)
    names = list(side.tensors)
    tensor = side.tensors[names[1]]
    side.tensors[names[1]] = tensor.transpose(2, 3).contiguous().transpose(2, 3)
    pages = importlib.import_module("pd_sidecar.kv.layout").geometry(side.tensors, side.hint)
    side.pages = pages
    parts = pieces(side, CHUNK, 0, 0, [4])
    move(fused, side, parts, device, gather=True)
    at = 4 * side.slot_bytes
    chunk = device[at : at + side.slot_bytes].view(torch.float32).view(2, LAYERS, CHUNK, -1)
    assert torch.equal(chunk, side.read(CHUNK))


def test_tables_that_do_not_fit_are_refused(fused):
    side = Side("0.32 HND", 32, memory(), torch.float32)
    for table in (torch.tensor([1]), torch.tensor([1, BLOCKS])):
        with pytest.raises(LayoutError):
            fused.Plan(side.pages, [Piece(0, table, (0, 40), (0, 40))])
