"""Moves the states of one group between an engine's tensors and slots on a GPU.

The states of a request are one sequence of bytes: tensor after tensor, layer after layer. A piece is a range of this
sequence. A *run* is the part of a piece that lies in one tensor. The kernel copies many runs: each program copies one
tile of one run.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from pd_sidecar.kv.layout import LayoutError
from pd_sidecar.kv.triton_copy import UNITS, on_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pd_sidecar.kv.copier import Piece
    from pd_sidecar.kv.states import States

FIELDS: tl.constexpr = tl.constexpr(4)
"""The number of fields that a run has. The fields are the place of its first element in the buffer, the address of its
block in the tensor, the index of its first element in the block, and its number of elements.
"""

TILE = 2048
"""The number of elements that one program copies: 16 KiB if an element has 8 bytes."""


@triton.jit  # type: ignore[untyped-decorator]
def _move_states(  # type: ignore[no-untyped-def]
    runs,
    buffer,
    columns: tl.constexpr,
    row_stride: tl.constexpr,
    column_stride: tl.constexpr,
    vector: tl.constexpr,
    gather: tl.constexpr,
    tile: tl.constexpr,
):
    """Copies one tile. The program's index is `[run, tile]`. `columns` is 0 if a block is contiguous."""
    run = runs + tl.program_id(0).to(tl.int64) * FIELDS
    first = tl.load(run + 2).to(tl.int32)
    count = tl.load(run + 3).to(tl.int32)
    number = tl.program_id(1) * tile + tl.arange(0, tile)
    mask = number < count
    index = first + number
    if columns > 0:
        index = index // columns * row_stride + index % columns * column_stride
    in_page = tl.load(run + 1).to(buffer.dtype) + index
    in_slot = buffer + tl.load(run) + number
    if vector > 1:
        # Tell Triton the width of one thread's access: Triton cannot derive it, because the starts come from a table.
        in_page = tl.max_contiguous(tl.multiple_of(in_page, [16]), [vector])
        in_slot = tl.max_contiguous(tl.multiple_of(in_slot, [16]), [vector])
    if gather:
        tl.store(in_slot, tl.load(in_page, mask=mask), mask=mask)
    else:
        tl.store(in_page, tl.load(in_slot, mask=mask), mask=mask)


@dataclass(frozen=True)
class _Kind:
    """The way in which a tensor is copied. Tensors of the same kind share a launch."""

    unit: int
    """The bytes of an element for the kernel."""
    vector: int
    """The number of elements that one thread may copy at once."""
    columns: int = 0
    row_stride: int = 0
    column_stride: int = 0
    """For a block that is not contiguous: its rows of `columns` elements, as the kernel's arguments."""


@dataclass(frozen=True)
class StatePlan:
    """The runs to move, by their kind: the kernel's table, the number of runs, and the elements of the longest run."""

    runs: list[tuple[_Kind, torch.Tensor, int, int]]


class StateMover:
    """The kernel, with the constants of one group's tensors and of the slots.

    All pieces begin and end at multiples of `step` bytes, in the slots and in the states.
    """

    def __init__(self, states: States, slot_bytes: int, step: int) -> None:
        self._slot_bytes = slot_bytes
        self._tensors = [tensor for layer in states.layers for tensor in layer]
        self._device = self._tensors[0].device
        self._starts = [0]
        """The first byte of each tensor in the states, and the end of the last tensor."""
        self._kinds: list[_Kind] = []
        for tensor in self._tensors:
            self._kinds.append(_kind(tensor, self._starts[-1], math.gcd(slot_bytes, step)))
            self._starts.append(self._starts[-1] + tensor[0].numel() * tensor.element_size())

    def plan(self, pieces: Sequence[Piece]) -> StatePlan:
        """Returns the pieces in the form that the kernel reads. Raises `LayoutError`."""
        found: dict[_Kind, list[int]] = {}
        longest: dict[_Kind, int] = {}
        for piece in pieces:
            block, end = int(piece.table[-1]), piece.start + piece.bytes
            at = bisect.bisect_right(self._starts, piece.start) - 1
            while at < len(self._tensors) and self._starts[at] < end:
                tensor, kind, start = self._tensors[at], self._kinds[at], self._starts[at]
                if not 0 < block < tensor.shape[0]:
                    raise LayoutError(f"the block table has block {block} for the state, not one of {tensor.shape[0]}")
                first, last = max(piece.start, start), min(end, self._starts[at + 1])
                in_slot = piece.slot * self._slot_bytes + piece.offset + first - piece.start
                address = tensor.data_ptr() + block * tensor.stride(0) * tensor.element_size()
                count = (last - first) // kind.unit
                found.setdefault(kind, []).extend((in_slot // kind.unit, address, (first - start) // kind.unit, count))
                longest[kind] = max(count, longest.get(kind, 0))
                at += 1
        return StatePlan(
            [
                (kind, torch.tensor(numbers, dtype=torch.int64), len(numbers) // FIELDS.value, longest[kind])
                for kind, numbers in found.items()
            ]
        )

    def move(self, plan: StatePlan, buffer: torch.Tensor, *, gather: bool) -> None:
        """Launches the kernel on the current stream. `buffer` holds the slots as bytes."""
        for kind, numbers, runs, longest in plan.runs:
            slots = buffer[: buffer.numel() // kind.unit * kind.unit].view(UNITS[kind.unit])
            _move_states[(runs, triton.cdiv(longest, TILE))](
                on_device(numbers, self._device),
                slots,
                kind.columns,
                kind.row_stride,
                kind.column_stride,
                vector=kind.vector,
                gather=gather,
                tile=TILE,
            )


def _kind(tensor: torch.Tensor, start: int, step: int) -> _Kind:
    """Returns how a tensor is copied whose first byte in the states is `start`. Raises `LayoutError`."""
    size, block = tensor.element_size(), tensor[0]
    if block.is_contiguous():
        # Copy as few and as wide elements as possible.
        widest = math.gcd(16, step, start, block.numel() * size, tensor.stride(0) * size, tensor.data_ptr())
        unit = min(widest, max(UNITS))
        return _Kind(unit, widest // unit)
    if block.dim() != 2 or math.gcd(size, step, start) != size:
        raise LayoutError(f"a state {tuple(block.shape)} with strides {block.stride()} cannot be moved on a GPU")
    return _Kind(size, 1, block.shape[1], *block.stride())
