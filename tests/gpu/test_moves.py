"""Tests the moves between pages and slots on a real GPU: layouts, order, speed, memory of another process."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("NOT TESTED: there is no GPU", allow_module_level=True)

from pd_sidecar.kv.copier import Piece, piece_of
from pd_sidecar.kv.cuda import OpenedMemory
from pd_sidecar.kv.gpu import Gpu, GpuCopier
from pd_sidecar.kv.host_copy import HostCopier
from pd_sidecar.kv.layout import Geometry, Hint, geometry
from pd_sidecar.kv.parts import GroupPart, Parts
from pd_sidecar.kv.parts_copy import PartsCopier
from pd_sidecar.kv.parts_mover import PartsMover
from pd_sidecar.kv.plan import Plan
from pd_sidecar.kv.states import States
from pd_sidecar.sidecar.wire import CudaMemory

CHUNK = 256
BLOCKS = 256
# Each value has three parts: the shape of a layer as a function of the block size, the physical order of the dimensions
# (None for the same order), and True for MLA.
LAYOUTS: dict[str, tuple[Any, Any, bool]] = {
    "NHD": (lambda n: (BLOCKS, 2, n, 8, 128), None, False),
    "HND": (lambda n: (BLOCKS, 2, n, 8, 128), (0, 1, 3, 2, 4), False),
    "packed": (lambda n: (BLOCKS, 8, n, 256), None, False),
    "packed NHD": (lambda n: (BLOCKS, 8, n, 256), (0, 2, 1, 3), False),
    "MLA": (lambda n: (BLOCKS, n, 576), None, True),
    "MLA fp8": (lambda n: (BLOCKS, n, 656), None, True),
}


def tensors(layout: str, block: int, dtype: Any, layers: int = 3, device: str = "cuda") -> dict[str, Any]:
    shape, order, _ = LAYOUTS[layout]
    shape = shape(block)
    order = order or tuple(range(len(shape)))
    found = {}
    for layer in range(layers):
        physical = torch.randint(0, 255, [shape[d] for d in order], dtype=torch.uint8, device=device)
        if dtype != torch.uint8:
            physical = physical.to(torch.float32).to(dtype)
        found[f"layers.{layer}"] = physical.permute([order.index(d) for d in range(len(shape))])
    return found


def pages_of(found: dict[str, Any], layout: str, block: int) -> Geometry:
    return geometry(found, Hint(BLOCKS, block, 8, 128, LAYOUTS[layout][2]))


def spans(tokens: int, table: Any, slots: list[int]) -> list[Piece]:
    return [
        Piece(slot, table, (at, min(at + CHUNK, tokens)), (at, min(at + CHUNK, tokens)))
        for at, slot in zip(range(0, tokens, CHUNK), slots, strict=True)
    ]


class Rig:
    """Tensors of KV pages on the GPU, and a copier between these pages and slots in this process."""

    def __init__(self, layout: str, block: int, dtype: Any, layers: int = 3, slots: int = 8) -> None:
        torch.manual_seed(4)
        self.tensors = tensors(layout, block, dtype, layers)
        self._over(pages_of(self.tensors, layout, block), slots)

    @classmethod
    def of_heads(cls, whole: Rig, heads: range) -> Rig:
        """Makes a rig over the tensors of `whole`, with slots for some of the heads."""
        rig = cls.__new__(cls)
        rig.tensors = whole.tensors
        rig._over(whole.pages.of_heads(heads), 8)
        return rig

    def _over(self, pages: Geometry, slots: int) -> None:
        self.pages = pages
        self.slot_bytes = self.pages.token_bytes * CHUNK
        self.gpu = Gpu(Parts.one(self.pages), 2, CHUNK)
        self.slots = torch.zeros(slots * self.slot_bytes, dtype=torch.uint8, device="cuda")
        mover = PartsMover(Parts.one(self.pages), self.slot_bytes)
        self.copier = GpuCopier(mover, self.slots, self.gpu._stream, self.gpu._engine, self.gpu._signals)

    def wait(self, fence: Any) -> None:
        torch.cuda.synchronize()
        assert fence.done()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8], ids=str)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kv_in_its_chunks_is_what_the_host_makes_of_it(layout: str, block: int, dtype: Any) -> None:
    rig = Rig(layout, block, dtype)
    tokens, slots = 3 * CHUNK + 100, [6, 1, 2, 4]
    table = torch.randperm(BLOCKS)[: -(-tokens // block)]
    rig.wait(rig.copier.gather(spans(tokens, table, slots), [rig.gpu.mark()]))
    host = {name: tensor.cpu() for name, tensor in rig.tensors.items()}
    # `cpu()` keeps the strides, because the tensors are dense.
    expect = torch.zeros(rig.slots.numel(), dtype=torch.uint8)
    HostCopier(pages_of(host, layout, block), expect.numpy().data, rig.slot_bytes).gather(spans(tokens, table, slots))
    assert torch.equal(rig.slots.cpu(), expect)
    # Scatter the chunks into other pages. A gather from these pages must then give the same chunks.
    other = torch.randperm(BLOCKS)[: len(table)]
    rig.wait(rig.copier.scatter(spans(tokens, other, slots), [rig.gpu.mark()]))
    rig.slots.zero_()
    rig.wait(rig.copier.gather(spans(tokens, other, slots), [rig.gpu.mark()]))
    assert torch.equal(rig.slots.cpu(), expect)


@pytest.mark.parametrize("layout", ["NHD", "HND", "packed", "packed NHD"])
def test_a_rank_has_its_heads_and_no_others(layout: str) -> None:
    """Checks that a worker of several ranks gathers and scatters the heads of each rank separately."""
    whole = Rig(layout, 64, torch.bfloat16)
    tokens, table, slots = CHUNK + 100, torch.randperm(BLOCKS)[:6], [3, 1]
    for heads in (range(4), range(4, 8), range(6, 8)):
        rig = Rig.of_heads(whole, heads)
        rig.wait(rig.copier.gather(spans(tokens, table, slots), [rig.gpu.mark()]))
        host = pages_of({name: tensor.cpu() for name, tensor in whole.tensors.items()}, layout, 64)
        expect = torch.zeros(rig.slots.numel(), dtype=torch.uint8)
        HostCopier(host.of_heads(heads), expect.numpy().data, rig.slot_bytes).gather(spans(tokens, table, slots))
        assert torch.equal(rig.slots.cpu(), expect)
        # Scatter into empty pages: only these heads of these tokens may change.
        target = Rig(layout, 64, torch.bfloat16)
        for tensor in target.tensors.values():
            tensor.zero_()
        empty = {name: tensor.cpu() for name, tensor in target.tensors.items()}
        back = Rig.of_heads(target, heads)
        back.slots.copy_(rig.slots)
        back.wait(back.copier.scatter(spans(tokens, table, slots), [back.gpu.mark()]))
        HostCopier(pages_of(empty, layout, 64).of_heads(heads), expect.numpy().data, rig.slot_bytes).scatter(
            spans(tokens, table, slots)
        )
        assert all(torch.equal(tensor.cpu(), empty[name]) for name, tensor in target.tensors.items())


@pytest.mark.parametrize("last", [False, True])
def test_a_gather_comes_after_what_was_computed_and_before_what_takes_its_blocks(last: bool) -> None:
    rig = Rig("NHD", 16, torch.bfloat16)
    table = torch.arange(16)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    for tensor in rig.tensors.values():
        tensor.fill_(1)
    fence = rig.copier.gather(spans(CHUNK, table, [3]), [rig.gpu.mark()], 0, last=last)
    assert not fence.done(), "the launch waited for the GPU"
    # The engine gives the blocks to another request, and immediately computes with them.
    rig.gpu.hold(fence)
    for tensor in rig.tensors.values():
        tensor.fill_(2)
    torch.cuda.synchronize()
    chunk = rig.slots[3 * rig.slot_bytes : 4 * rig.slot_bytes].view(torch.bfloat16)
    assert fence.done()
    assert torch.all(chunk == 1)
    assert 0 < fence.seconds < 0.05, "the measured time includes the wait before the move"


def test_layers_are_in_their_slots_while_the_last_ones_are_computed() -> None:
    rig = Rig("NHD", 16, torch.bfloat16)
    table = torch.arange(16)
    tensors = list(rig.tensors.values())
    torch.cuda.synchronize()
    layered_copy = rig.copier.layered_copy(spans(CHUNK, table, [3]))
    for number, tensor in enumerate(tensors):
        if number == 2:
            layered_copy.gather(2, 0)
            torch.cuda._sleep(400_000_000)
        tensor.fill_(number + 1)
    layered_copy.gather(3, 1)
    fence = layered_copy.fence
    rig.gpu._signals[0].synchronize()
    assert not rig.gpu._signals[1].query(), "the first layers waited for the last"
    assert not fence.done()
    torch.cuda.synchronize()
    chunk = rig.slots[3 * rig.slot_bytes : 4 * rig.slot_bytes].view(torch.bfloat16).view(2, 3, -1)
    for number in range(3):
        assert torch.all(chunk[:, number] == number + 1)
    assert fence.done()
    assert 0 < fence.seconds < 0.05, "the measured time includes the wait before the move"


def test_a_slot_that_is_granted_anew_is_written_by_the_later_gather_last() -> None:
    rig = Rig("NHD", 16, torch.bfloat16)
    for tensor in rig.tensors.values():
        tensor[:16].fill_(1)
        tensor[16:].fill_(2)
    torch.cuda.synchronize()
    # The first gather waits for a step of the engine; the second gather could start at once.
    torch.cuda._sleep(200_000_000)
    rig.copier.gather(spans(CHUNK, torch.arange(16), [3]), [rig.gpu.mark()], 0, last=True)
    rig.copier.gather(spans(CHUNK, torch.arange(16, 32), [3]), [], 1)
    other = rig.copier.gather(spans(CHUNK, torch.arange(16, 32), [2]), [], None)
    torch.cuda.synchronize()
    assert other.done()
    for slot in (2, 3):
        chunk = rig.slots[slot * rig.slot_bytes : (slot + 1) * rig.slot_bytes].view(torch.bfloat16)
        assert torch.all(chunk == 2), slot


def test_a_scatter_comes_after_what_may_still_write_to_its_blocks() -> None:
    rig = Rig("NHD", 16, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    for tensor in rig.tensors.values():
        tensor.fill_(5)
    fence = rig.copier.scatter(spans(CHUNK, torch.arange(16), [0]), [rig.gpu.mark()])
    assert not fence.done()
    torch.cuda.synchronize()
    assert torch.all(next(iter(rig.tensors.values()))[:16] == 0)
    assert torch.all(next(iter(rig.tensors.values()))[16:] == 5)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_moves_run_at_copy_speed(layout: str, record_property: Any) -> None:
    # The KV of 20 chunks of an 8B model is 640 MiB.
    torch.manual_seed(4)
    found = tensors(layout, 16, torch.bfloat16, layers=32)
    found = {name: torch.cat([t, t]) if layout == "NHD" else t.repeat(2, 1, 1, 1, 1) for name, t in found.items()}
    if layout == "HND":
        found = {n: t.permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4) for n, t in found.items()}
    pages = geometry(found, Hint(2 * BLOCKS, 16, 8, 128, False))
    slot_bytes = pages.token_bytes * CHUNK
    gpu = Gpu(Parts.one(pages), 0, CHUNK)
    slots = torch.zeros(20 * slot_bytes, dtype=torch.uint8, device="cuda")
    copier = GpuCopier(PartsMover(Parts.one(pages), slot_bytes), slots, gpu._stream, gpu._engine, [])
    parts = spans(20 * CHUNK, torch.randperm(2 * BLOCKS)[:320], list(range(20)))
    seconds: dict[str, list[float]] = {"gather": [], "scatter": []}
    for _ in range(8):
        for name, move in (("gather", copier.gather), ("scatter", copier.scatter)):
            fence = move(parts, [gpu.mark()])
            torch.cuda.synchronize()
            assert fence.done()
            seconds[name].append(fence.seconds)
    for name, times in seconds.items():
        rate = slots.numel() / min(times) / 1e9
        record_property(f"{name}_gb_per_s", rate)
        print(f"{layout}: {name} of 640 MiB {min(times) * 1e3:.3f} ms, {rate:.0f} GB/s")
        assert rate > 700, times


# KV of several groups.

# Each value has the groups of a model: kind, size, number of layers, KV heads and head size; for a state: the number of
# layers, and the shapes of the convolution's inputs and of the sum.
GROUPS: dict[str, list[tuple[Any, ...]]] = {
    "windows": [("full", 0, 12, 8, 64), ("window", 128, 12, 8, 64)],
    "gated delta net": [("full", 0, 12, 2, 256), ("state", 36, (8192, 3), (32, 128, 128))],
    "Mamba 2": [("full", 0, 4, 8, 128), ("state", 36, (3328, 3), (48, 64, 128))],
}


def groups_of(name: str, block: int, device: str = "cuda") -> Parts:
    """Returns the parts of a model with random KV. States are parts of a larger tensor, as vLLM makes them."""
    parts = []
    for number, (kind, *described) in enumerate(GROUPS[name]):
        if kind == "state":
            layers, conv, total = described
            sizes = [conv[0] * conv[1], total[0] * total[1] * total[2]]
            found = []
            for _ in range(layers):
                # Twice as many elements of two bytes: the sum has four bytes for each element.
                whole = torch.randn(8, sizes[0] + 2 * sizes[1], device=device).to(torch.bfloat16)
                inputs = whole[:, : sizes[0]].unflatten(1, conv).transpose(1, 2)
                found.append((inputs, whole[:, sizes[0] :].view(torch.float32).unflatten(1, total)))
            parts.append(GroupPart(number, kind, States(tuple(found), tuple(f"state.{n}" for n in range(layers)))))
            continue
        size, layers, heads, width = described
        own = {f"{number}.{n}": torch.randn(BLOCKS, heads, block, 2 * width, device=device) for n in range(layers)}
        own = {name: tensor.to(torch.bfloat16) for name, tensor in own.items()}
        parts.append(GroupPart(number, kind, geometry(own, Hint(BLOCKS, block, heads, width, False)), size))
    return Parts(tuple(parts))


def on_host(parts: Parts) -> Parts:
    """Returns copies of the parts in host memory."""

    def copied(part: GroupPart) -> GroupPart:
        if isinstance(part.pages, States):
            states = tuple(tuple(tensor.cpu() for tensor in layer) for layer in part.pages.layers)
            return replace(part, pages=States(states, part.pages.names))
        pages = [replace(page, tensor=page.tensor.cpu()) for page in part.pages.layers]
        return replace(part, pages=replace(part.pages, layers=tuple(pages)))

    return Parts(tuple(map(copied, parts.parts)))


@pytest.mark.parametrize("tokens", [70, 3000])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_what_the_host_makes_of_them(name: str, tokens: int) -> None:
    torch.manual_seed(5)
    parts = groups_of(name, 16)
    plan = Plan(parts.groups, CHUNK, tokens=tokens, have=0)
    gpu = Gpu(parts, 0, CHUNK)
    slots = torch.zeros(plan.chunks * plan.slot_bytes, dtype=torch.uint8, device="cuda")
    copier = GpuCopier(PartsMover(parts, plan.slot_bytes), slots, gpu._stream, gpu._engine, [])

    def pieces(seed: int) -> list[Piece]:
        torch.manual_seed(seed)
        tables = [torch.randperm(BLOCKS - 1)[: -(-tokens // 16)] + 1, torch.randperm(BLOCKS - 1) + 1, torch.tensor([5])]
        own = {n: tables[2 if part.kind == "state" else n] for n, part in enumerate(parts.parts)}
        return [piece_of(part, chunk, own[part.group]) for chunk in plan.wanted() for part in plan.parts(chunk)]

    fences = {"gather": copier.gather(pieces(1), [gpu.mark()])}
    torch.cuda.synchronize()
    host = mmap.mmap(-1, slots.numel())
    PartsCopier(on_host(parts), host, plan.slot_bytes).gather(pieces(1))
    expect = torch.frombuffer(host, dtype=torch.uint8)
    assert torch.equal(slots.cpu(), expect)
    assert expect.any()
    # Then move everything into other blocks, and from these blocks into empty slots.
    fences["scatter"] = copier.scatter(pieces(2), [gpu.mark()])
    torch.cuda.synchronize()
    slots.zero_()
    copier.gather(pieces(2), [gpu.mark()])
    torch.cuda.synchronize()
    assert torch.equal(slots.cpu(), expect)
    for kind, fence in fences.items():
        assert fence.done()
        print(f"{name}, {tokens} tokens: {kind} of {plan.bytes / 2**20:.1f} MiB {fence.seconds * 1e3:.3f} ms")


@pytest.mark.parametrize("name", GROUPS)
def test_how_fast_groups_move(name: str, record_property: Any) -> None:
    """Prints the speed of eight requests at once. Asserts only that all bytes were moved."""
    torch.manual_seed(6)
    parts = groups_of(name, 16)
    plan = Plan(parts.groups, CHUNK, tokens=2048, have=0)
    gpu = Gpu(parts, 0, CHUNK)
    slots = torch.zeros(7 * plan.chunks * plan.slot_bytes, dtype=torch.uint8, device="cuda")
    copier = GpuCopier(PartsMover(parts, plan.slot_bytes), slots, gpu._stream, gpu._engine, [])
    table = torch.randperm(BLOCKS - 1)[:128] + 1
    pieces = [
        piece_of(part, request * plan.chunks + chunk, torch.tensor([request + 1]) if plan.is_state(chunk) else table)
        for request in range(7)
        for chunk in plan.wanted()
        for part in plan.parts(chunk)
    ]
    for kind, move in (("gather", copier.gather), ("scatter", copier.scatter)):
        times = []
        for _ in range(6):
            fence = move(pieces, [gpu.mark()])
            torch.cuda.synchronize()
            assert fence.done()
            times.append(fence.seconds)
        rate = 7 * plan.bytes / min(times) / 1e9
        record_property(f"{kind}_gb_per_s", rate)
        print(f"{name}: {kind} of {7 * plan.bytes / 2**20:.0f} MiB {min(times) * 1e3:.3f} ms, {rate:.0f} GB/s")
    moved = slots.view(7, -1)[:, : plan.slot_bytes]
    assert all(bool(slot.any()) for slot in moved)


# Memory of another process.

SIZE = 64 << 20


@pytest.fixture
def owner() -> Iterator[Any]:
    yield (started := start_owner())
    started.kill()
    started.wait()


def start_owner() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("owner.py")), str(SIZE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def opened(owner: subprocess.Popen[str]) -> tuple[OpenedMemory, Any]:
    assert owner.stdout is not None
    said = json.loads(owner.stdout.readline())
    memory = OpenedMemory(CudaMemory(said["uuid"], bytes.fromhex(said["handle"]), SIZE))
    return memory, torch.as_tensor(memory, device="cuda:0")


def test_memory_of_another_process_is_written_where_it_lies(owner: subprocess.Popen[str]) -> None:
    _, view = opened(owner)
    assert view.data_ptr()
    assert int(view.sum()) == 0
    view[1000:2000] = 7
    torch.cuda.synchronize()
    assert owner.stdin is not None
    assert owner.stdout is not None
    owner.stdin.write("sum 0 4096\n")
    owner.stdin.flush()
    assert owner.stdout.readline().strip() == "7000"


def test_the_death_of_the_owner_does_no_harm_and_another_is_opened(owner: subprocess.Popen[str]) -> None:
    memory, view = opened(owner)
    owner.kill()
    owner.wait()
    view.fill_(1)
    torch.cuda.synchronize()
    del view, memory
    again = start_owner()
    try:
        _, view = opened(again)
        assert int(view.sum()) == 0
        view.fill_(1)
        torch.cuda.synchronize()
        assert int(view.sum()) == SIZE
    finally:
        again.kill()
        again.wait()
