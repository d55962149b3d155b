"""Moves the KV of one group between pages and slots on a GPU, with one launch for all requests of a step.

The kernel reads the place of each piece from a plan that comes with the launch. So the kernel needs neither a second
copy nor row numbers, which take megabytes. Values that are the same in every launch are compiled into the kernel.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from pd_sidecar.kv.layout import Geometry, LayoutError, Pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pd_sidecar.kv.copier import Piece

FIELDS: tl.constexpr = tl.constexpr(7)
"""The number of fields that the plan has per piece. The fields are slot, first token, number of tokens, number of
tokens in the slot, index of the first moved token in the slot, start of the piece's block table, and the first byte of
the group in the slot.
"""

TOKENS, COLUMNS = 16, 256
"""The size of one program's tile, in tokens and elements: 32 KiB if an element has 8 bytes."""


@triton.jit(do_not_specialize=["pieces", "first_layer", "layers"])  # type: ignore[untyped-decorator]
def _move(  # type: ignore[no-untyped-def]
    plan,
    bases,
    numbers,
    inside,
    buffer,
    pieces,
    first_layer,
    layers,
    block_units: tl.constexpr,
    slot_units: tl.constexpr,
    unit: tl.constexpr,
    layer_count: tl.constexpr,
    block_tokens: tl.constexpr,
    runs: tl.constexpr,
    run_units: tl.constexpr,
    vector: tl.constexpr,
    gather: tl.constexpr,
    token_tile: tl.constexpr,
    column_tile: tl.constexpr,
):
    """Copies one tile. The program's index is `[token tile, plane and layer, piece]`."""
    record = plan + tl.program_id(2).to(tl.int64) * FIELDS
    slot = tl.load(record)
    first = tl.load(record + 1)
    tokens = tl.load(record + 2)
    packed = tl.load(record + 3)
    offset = tl.load(record + 4)
    table = plan + pieces.to(tl.int64) * FIELDS + tl.load(record + 5)
    group = tl.load(record + 6) // unit

    plane = tl.program_id(1) // layers
    layer = first_layer + tl.program_id(1) % layers
    page = tl.load(bases + layer).to(buffer.dtype)
    number = plane * layer_count + tl.load(numbers + layer)

    token = tl.program_id(0) * token_tile + tl.arange(0, token_tile)
    wanted = token < tokens
    position = first + token
    block = tl.load(table + position // block_tokens, mask=wanted, other=0)
    in_block = position % block_tokens
    starts = inside + (plane * block_tokens + in_block) * runs
    row_units: tl.constexpr = runs * run_units
    rows = slot * slot_units + group + (number * packed + offset + token) * row_units
    for at in range(0, row_units, column_tile):
        column = at + tl.arange(0, column_tile)
        mask = wanted[:, None] & (column < row_units)[None, :]
        start = tl.load(starts[:, None] + (column // run_units)[None, :], mask=mask, other=0)
        in_page = page + (block * block_units)[:, None] + start + (column % run_units)[None, :]
        in_slot = buffer + rows[:, None] + column[None, :]
        if vector > 1:
            # Tell Triton the width of one thread's access: Triton cannot derive it, because the starts come from a
            # table.
            in_page = tl.max_contiguous(tl.multiple_of(in_page, [1, 16]), [1, vector])
            in_slot = tl.max_contiguous(tl.multiple_of(in_slot, [1, 16]), [1, vector])
        if gather:
            tl.store(in_slot, tl.load(in_page, mask=mask), mask=mask)
        else:
            tl.store(in_page, tl.load(in_slot, mask=mask), mask=mask)


@dataclass(frozen=True)
class _Part:
    """The layers whose blocks have the same arrangement; usually these are all layers."""

    bases: torch.Tensor
    """The address of each layer's block 0."""
    numbers: torch.Tensor
    """The index of each layer among all layers."""
    inside: torch.Tensor
    """The start of each run in a block: `[plane, token, run]`, in units."""
    places: list[int]
    """The same numbers as `numbers`, in host memory."""
    block_units: int
    planes: int
    run_units: int


class Plan:
    """The pieces to move, in the form that the kernel reads. Raises `LayoutError`."""

    def __init__(self, pages: Geometry, pieces: Sequence[Piece]) -> None:
        page = pages.first
        ratio = pages.block_tokens // page.tokens
        tables: dict[int, int] = {}
        parts: list[torch.Tensor] = []
        records: list[int] = []
        length = 0
        for piece in pieces:
            (first, end), (start, stop) = piece.packed, piece.tokens
            if (stop - 1) // pages.block_tokens >= piece.table.numel():
                raise LayoutError(f"a table of {piece.table.numel()} blocks does not reach token {stop - 1}")
            if id(piece.table) not in tables:
                tables[id(piece.table)] = length
                # One block of a table may be several blocks of the tensor.
                table = (piece.table.view(-1, 1) * ratio + torch.arange(ratio)).view(-1)
                if int(table.max()) >= page.blocks or int(table.min()) < 0:
                    raise LayoutError(
                        f"a block table names a block that does not exist: there are only {page.blocks} blocks"
                    )
                parts.append(table)
                length += table.numel()
            at = tables[id(piece.table)]
            records += [piece.slot, start, stop - start, end - first, start - first, at, piece.offset]
        self.there: torch.Tensor | None = None
        """The copy of `numbers` on the GPU; `None` before the first launch."""
        self.pieces = len(pieces)
        self.tokens = max(piece.tokens[1] - piece.tokens[0] for piece in pieces)
        self.numbers = torch.cat([torch.tensor(records, dtype=torch.int64), *parts])


class Mover:
    """The kernel, with the constants of one group's tensors and of the slots.

    The group begins at multiples of `offset_step` bytes in the slots; 0 if it always begins at the first byte.
    """

    def __init__(self, pages: Geometry, slot_bytes: int, offset_step: int = 0) -> None:
        self.pages = pages
        self._device = pages.first.tensor.device
        widest = _widest(pages, math.gcd(slot_bytes, offset_step))
        self._unit = min(widest, max(UNITS))
        self._vector = widest // self._unit
        self._dtype = UNITS[self._unit]
        self._slot_units = slot_bytes // self._unit
        self._parts = [self._part(layers) for layers in _alike(pages.layers)]

    def move(
        self,
        plan: Plan,
        buffer: torch.Tensor,
        *,
        gather: bool,
        layers: tuple[int, int] | None = None,
    ) -> None:
        """Launches the kernel on the current stream. `buffer` holds the slots as bytes."""
        # Keep the copy with the plan: the launches for further ranges of layers use it on the same stream.
        if plan.there is None:
            plan.there = on_device(plan.numbers, self._device)
        numbers = plan.there
        first, below = layers or (0, len(self.pages.layers))
        slots = buffer[: buffer.numel() // self._unit * self._unit].view(self._dtype)
        for part in self._parts:
            # The layers of a part are in ascending order, so a range of layers is one slice of the part.
            start, end = (bisect.bisect_left(part.places, layer) for layer in (first, below))
            if start == end:
                continue
            grid = (triton.cdiv(plan.tokens, TOKENS), part.planes * (end - start), plan.pieces)
            _move[grid](
                numbers,
                part.bases,
                part.numbers,
                part.inside,
                slots,
                plan.pieces,
                start,
                end - start,
                part.block_units,
                self._slot_units,
                self._unit,
                len(self.pages.layers),
                self.pages.first.tokens,
                part.inside.shape[2],
                part.run_units,
                vector=self._vector,
                gather=gather,
                token_tile=TOKENS,
                column_tile=COLUMNS,
            )

    def _part(self, layers: list[tuple[int, Pages]]) -> _Part:
        page = layers[0][1]
        size = page.tensor.element_size()
        run = _run_elements(page)
        inside = page.inside[:, :, ::run] * size // self._unit
        return _Part(
            bases=torch.tensor([p.tensor.data_ptr() for _, p in layers], device=self._device),
            numbers=torch.tensor([number for number, _ in layers], device=self._device),
            inside=inside.contiguous().to(self._device),
            places=[number for number, _ in layers],
            block_units=page.block_stride * size // self._unit,
            planes=page.planes,
            run_units=run * size // self._unit,
        )


def on_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a copy of `numbers` for the kernel. Does not wait for the GPU."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


def _alike(layers: tuple[Pages, ...]) -> list[list[tuple[int, Pages]]]:
    """Groups layers whose blocks have the same arrangement. Each layer comes with its number."""
    groups: list[list[tuple[int, Pages]]] = []
    for entry in enumerate(layers):
        for group in groups:
            other = group[0][1]
            if entry[1].block_stride == other.block_stride and torch.equal(entry[1].inside, other.inside):
                group.append(entry)
                break
        else:
            groups.append([entry])
    return groups


def _run_elements(page: Pages) -> int:
    """Returns the length of the longest run of elements that is contiguous in every token of a block."""
    inside = page.inside
    ends = (inside[:, :, 1:] != inside[:, :, :-1] + 1).any(0).any(0).nonzero().view(-1) + 1
    return math.gcd(inside.shape[2], *ends.tolist())


def _widest(pages: Geometry, slot_step: int) -> int:
    """Returns the largest number of bytes, up to 16, that divides the start and the length of every run. In the slots
    the group begins at multiples of `slot_step`.
    """
    unit = math.gcd(16, slot_step)
    for page in pages.layers:
        size, run = page.tensor.element_size(), _run_elements(page)
        unit = math.gcd(unit, run * size, page.block_stride * size, page.tensor.data_ptr())
        unit = math.gcd(unit, *(size * page.inside[:, :, ::run]).unique().tolist())
    return unit


UNITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
"""The dtypes of a kernel's elements, by their bytes."""
