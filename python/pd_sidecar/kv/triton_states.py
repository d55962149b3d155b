"""Moves the states of one group between an engine's tensors and slots on a GPU.

The states of a request are one sequence of bytes: tensor after tensor, layer after layer. A piece is a range of this
sequence. The kernel copies all pieces of a step: each program copies one tile of one tensor for one piece.
"""

from __future__ import annotations

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

FIELDS: tl.constexpr = tl.constexpr(5)
"""The number of fields that the plan has per piece. The fields are slot, first byte in the slot, block, first byte in
the states, and number of bytes.
"""

COLUMNS: tl.constexpr = tl.constexpr(7)
"""The number of fields that describe a tensor. The fields are the address of block 0, the units between two blocks, the
units of one block, the units of the states before this tensor, the units of a row, and the units between two rows and
between two elements of a row.
"""

TILE = 4096
"""The number of elements that one program copies."""


@triton.jit  # type: ignore[untyped-decorator]
def _move_states(  # type: ignore[no-untyped-def]
    plan,
    tensors,
    buffer,
    slot_units: tl.constexpr,
    unit: tl.constexpr,
    gather: tl.constexpr,
    tile: tl.constexpr,
):
    """Copies one tile. The program's index is `[tile, tensor, piece]`."""
    record = plan + tl.program_id(2).to(tl.int64) * FIELDS
    slot = tl.load(record)
    offset = tl.load(record + 1) // unit
    block = tl.load(record + 2)
    start = tl.load(record + 3) // unit
    length = tl.load(record + 4) // unit

    own = tensors + tl.program_id(1).to(tl.int64) * COLUMNS
    page = tl.load(own).to(buffer.dtype) + block * tl.load(own + 1)
    count = tl.load(own + 2)
    before = tl.load(own + 3)
    columns = tl.load(own + 4)

    index = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    at = before + index - start
    mask = (index < count) & (at >= 0) & (at < length)
    in_page = page + index // columns * tl.load(own + 5) + index % columns * tl.load(own + 6)
    in_slot = buffer + slot * slot_units + offset + at
    if gather:
        tl.store(in_slot, tl.load(in_page, mask=mask), mask=mask)
    else:
        tl.store(in_page, tl.load(in_slot, mask=mask), mask=mask)


class StatePlan:
    """The pieces to move, in the form that the kernel reads. Raises `LayoutError`."""

    def __init__(self, states: States, pieces: Sequence[Piece]) -> None:
        blocks = min(tensor.shape[0] for layer in states.layers for tensor in layer)
        records: list[int] = []
        for piece in pieces:
            block = int(piece.table[-1])
            if not 0 < block < blocks:
                raise LayoutError(f"the block table has block {block} for the state; there are {blocks}")
            records += [piece.slot, piece.offset, block, piece.start, piece.bytes]
        self.pieces = len(pieces)
        self.numbers = torch.tensor(records, dtype=torch.int64)


@dataclass(frozen=True)
class _Tensors:
    """The tensors that are copied with elements of one size."""

    unit: int
    numbers: torch.Tensor
    """`COLUMNS` numbers for each tensor."""
    count: int
    longest: int
    """The units of the longest tensor's block."""


class StateMover:
    """The kernel, with the constants of one group's tensors and of the slots.

    All pieces begin and end at multiples of `step` bytes, in the slots and in the states.
    """

    def __init__(self, states: States, slot_bytes: int, step: int) -> None:
        self.states = states
        self._slot_bytes = slot_bytes
        self._device = states.layers[0][0].device
        found: dict[int, list[list[int]]] = {}
        before = 0
        for tensor in (tensor for layer in states.layers for tensor in layer):
            unit, row = _described(tensor, before, math.gcd(slot_bytes, step))
            found.setdefault(unit, []).append(row)
            before += tensor[0].numel() * tensor.element_size()
        self._tensors = [
            _Tensors(unit, torch.tensor(rows).to(self._device), len(rows), max(row[2] for row in rows))
            for unit, rows in found.items()
        ]

    def move(self, plan: StatePlan, buffer: torch.Tensor, *, gather: bool) -> None:
        """Launches the kernel on the current stream. `buffer` holds the slots as bytes."""
        numbers = on_device(plan.numbers, self._device)
        for tensors in self._tensors:
            slots = buffer[: buffer.numel() // tensors.unit * tensors.unit].view(UNITS[tensors.unit])
            grid = (triton.cdiv(tensors.longest, TILE), tensors.count, plan.pieces)
            _move_states[grid](
                numbers,
                tensors.numbers,
                slots,
                self._slot_bytes // tensors.unit,
                tensors.unit,
                gather=gather,
                tile=TILE,
            )


def _described(tensor: torch.Tensor, before: int, step: int) -> tuple[int, list[int]]:
    """Returns the bytes of an element for the kernel, and the tensor's `COLUMNS` numbers. Raises `LayoutError`.

    `before` is the number of bytes of the states before this tensor.
    """
    size, block = tensor.element_size(), tensor[0]
    numel = block.numel()
    if block.is_contiguous():
        # Copy as few and as wide elements as possible.
        unit = math.gcd(8, step, before, numel * size, tensor.stride(0) * size, tensor.data_ptr())
        columns, strides = numel * size // unit, (numel * size // unit, 1)
    else:
        unit = size
        if block.dim() != 2 or math.gcd(unit, step, before) != unit:
            raise LayoutError(f"a state {tuple(block.shape)} with strides {block.stride()} cannot be moved on a GPU")
        columns, strides = block.shape[1], block.stride()
    return unit, [
        tensor.data_ptr(), tensor.stride(0) * size // unit, numel * size // unit, before // unit, columns, *strides,
    ]  # fmt: skip
