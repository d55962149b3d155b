"""Moves KV between an engine's pages and the slots of a sidecar's buffer.

Both sides are seen as rows of equal length, and a move is one `index_select` or `index_copy_` over
row numbers: no loop over tokens, blocks or heads, whatever the page layout, on any device. The
slots of a step usually follow each other; then the rows of the buffer are a plain slice and the
move touches memory once.

A chunk in its slot is LMCache's `KV_2LTD`, packed at the start: `[planes, layers, tokens, width]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from .layout import Geometry, LayoutError, Pages, row_bytes

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterable, Iterator, Sequence

MAX_ROWS = 1 << 20
"""Rows of one move: bounds the memory of its row numbers to 8 MiB."""


@dataclass(frozen=True)
class Piece:
    """A part of a chunk, and where it lies."""

    slot: int
    table: torch.Tensor
    """The request's block ids, int64."""
    packed: tuple[int, int]
    """The tokens `[from, to)` that stand in the slot."""
    tokens: tuple[int, int]
    """The tokens of them to be moved."""


class Fence(Protocol):
    """The end of a move. On a GPU it is an event; a slot or block is reused only after it."""

    def done(self) -> bool:
        """The move is over."""
        ...


class _Over:
    def done(self) -> bool:
        return True


OVER = _Over()
"""The fence of a move that was over when it returned, as every move between host memories is."""


class Copier:
    """Gathers and scatters for one worker's tensors and one buffer."""

    def __init__(self, pages: Geometry, buffer: mmap.mmap, slot_bytes: int) -> None:
        """Raises `LayoutError` if the tensors and the buffer have no common row."""
        device = pages.first.tensor.device
        if device.type != "cpu":
            raise LayoutError(
                f"KV on {device}: the buffer is host memory, this version moves no more"
            )
        width = row_bytes(pages.layers, slot_bytes)
        self._element = next(e for e in _ELEMENTS if width % e.itemsize == 0)
        self._width = width
        self._pages = pages
        page = pages.first
        self._runs = page.heads * page.head_size * page.tensor.element_size() // width
        """Rows of one plane of one layer of one token."""
        self._slot_rows = slot_bytes // width
        self._buffer = self._rows(torch.frombuffer(buffer, dtype=torch.uint8))
        self._parts = [self._part(layers) for layers in _by_storage(pages.layers)]

    def gather(self, pieces: Iterable[Piece]) -> Fence:
        """Pages to slots."""
        for part, batch in self._batches(pieces):
            source = part.rows_of(batch)
            target = self._buffer_rows(part, batch)
            if isinstance(target, slice):
                torch.index_select(part.rows, 0, source, out=self._buffer[target])
            else:
                self._buffer.index_copy_(0, target, part.rows.index_select(0, source))
        return OVER

    def scatter(self, pieces: Iterable[Piece]) -> Fence:
        """Slots to pages. Writes the tokens that the pieces name and no others."""
        for part, batch in self._batches(pieces):
            source = self._buffer_rows(part, batch)
            rows = (
                self._buffer[source]
                if isinstance(source, slice)
                else self._buffer.index_select(0, source)
            )
            part.rows.index_copy_(0, part.rows_of(batch), rows)
        return OVER

    def _batches(self, pieces: Iterable[Piece]) -> Iterator[tuple[_Part, _Batch]]:
        """Pieces of the same form together, in the order of their slots."""
        forms: dict[tuple[int, int, int], list[Piece]] = {}
        for piece in sorted(pieces, key=lambda p: p.slot):
            (packed, packed_to), (start, stop) = piece.packed, piece.tokens
            forms.setdefault((packed_to - packed, start - packed, stop - start), []).append(piece)
        for (packed, offset, tokens), group in forms.items():
            rows = 2 * len(self._pages.layers) * tokens * self._runs
            step = max(1, MAX_ROWS // rows)
            for at in range(0, len(group), step):
                batch = _Batch(group[at : at + step], packed, offset, tokens, self._pages)
                for part in self._parts:
                    yield part, batch

    def _buffer_rows(self, part: _Part, batch: _Batch) -> slice | torch.Tensor:
        slots = batch.slots
        if part.whole and batch.is_whole:
            rows = part.base.numel() * batch.tokens
            first = slots[0] * self._slot_rows
            if len(slots) == 1 or (
                rows == self._slot_rows and slots[-1] - slots[0] == len(slots) - 1
            ):
                return slice(first, first + rows * len(slots))
        layers = len(self._pages.layers)
        planes = torch.arange(self._pages.first.planes).view(1, -1, 1, 1, 1)
        tokens = torch.arange(batch.tokens).view(1, 1, 1, -1, 1) + batch.offset
        within = (planes * layers + part.layers.view(1, 1, -1, 1, 1)) * batch.packed + tokens
        within = within * self._runs + torch.arange(self._runs)
        starts = torch.tensor(slots).view(-1, 1, 1, 1, 1) * self._slot_rows
        return (starts + within).reshape(-1)

    def _rows(self, data: torch.Tensor) -> torch.Tensor:
        usable = data.numel() // self._width * self._width
        return data[:usable].view(self._element).view(-1, self._width // self._element.itemsize)

    def _part(self, layers: list[tuple[int, Pages]]) -> _Part:
        first = layers[0][1].tensor
        data = torch.empty(0, dtype=torch.uint8, device=first.device)
        data.set_(first.untyped_storage())
        size = first.element_size()

        def rows(elements: int) -> int:
            return elements * size // self._width

        page = layers[0][1]
        starts = torch.tensor([rows(p.tensor.storage_offset()) for _, p in layers])
        planes = torch.arange(page.planes) * rows(page.plane_stride)
        if page.head_stride != page.head_size:
            # A head is one row, or several that follow each other.
            per_head = self._runs // page.heads
            heads = torch.arange(page.heads).view(-1, 1) * rows(page.head_stride)
            runs = (heads + torch.arange(per_head)).reshape(-1)
        else:
            # Heads lie side by side: the rows of a token follow each other.
            runs = torch.arange(self._runs)
        base = planes.view(-1, 1, 1, 1) + starts.view(1, -1, 1, 1) + runs.view(1, 1, 1, -1)
        return _Part(
            rows=self._rows(data),
            layers=torch.tensor([index for index, _ in layers]),
            base=base.unsqueeze(0),
            block_rows=rows(page.block_stride),
            token_rows=rows(page.token_stride),
            whole=len(layers) == len(self._pages.layers),
        )


@dataclass(frozen=True)
class _Part:
    """The layers that share a storage and its strides: usually all."""

    rows: torch.Tensor
    layers: torch.Tensor
    base: torch.Tensor
    """Row of token 0 of block 0, `[1, planes, layers, 1, runs]`."""
    block_rows: int
    token_rows: int
    whole: bool

    def rows_of(self, batch: _Batch) -> torch.Tensor:
        """The rows of a batch in the pages, in the order of a chunk."""
        at = batch.blocks * self.block_rows + batch.offsets * self.token_rows
        return (self.base + at.view(len(batch.slots), 1, 1, -1, 1)).reshape(-1)


class _Batch:
    """Pieces of one form: as many tokens each, packed alike."""

    def __init__(
        self, pieces: Sequence[Piece], packed: int, offset: int, tokens: int, pages: Geometry
    ) -> None:
        self.slots = [piece.slot for piece in pieces]
        self.packed = packed
        self.offset = offset
        self.tokens = tokens
        # Requests have tables of their own: they are laid end to end, each piece knows its start.
        starts: dict[int, int] = {}
        tables: list[torch.Tensor] = []
        length = 0
        for piece in pieces:
            if (piece.tokens[1] - 1) // pages.block_tokens >= piece.table.numel():
                raise LayoutError(
                    f"{piece.table.numel()} blocks do not hold token {piece.tokens[1] - 1}"
                )
            if id(piece.table) not in starts:
                starts[id(piece.table)] = length
                tables.append(piece.table)
                length += piece.table.numel()
        table = torch.cat(tables)
        start = torch.tensor([starts[id(piece.table)] for piece in pieces]).view(-1, 1)
        first = torch.tensor([piece.tokens[0] for piece in pieces]).view(-1, 1)
        positions = first + torch.arange(tokens)
        ids = table[start + torch.div(positions, pages.block_tokens, rounding_mode="floor")]
        page = pages.first
        within = positions % pages.block_tokens
        # A table's block may be several of the tensor's.
        ratio = pages.block_tokens // page.tokens
        self.blocks = ids * ratio + torch.div(within, page.tokens, rounding_mode="floor")
        self.offsets = within % page.tokens
        if int(self.blocks.max()) >= page.blocks or int(self.blocks.min()) < 0:
            raise LayoutError(f"a block table names a block beyond {page.blocks}")

    @property
    def is_whole(self) -> bool:
        """The pieces are all that their slots hold."""
        return self.offset == 0 and self.tokens == self.packed


def _by_storage(layers: tuple[Pages, ...]) -> list[list[tuple[int, Pages]]]:
    groups: dict[tuple[int, ...], list[tuple[int, Pages]]] = {}
    for index, page in enumerate(layers):
        key = (
            page.tensor.untyped_storage().data_ptr(),
            page.block_stride,
            page.token_stride,
            page.head_stride,
            page.plane_stride,
        )
        groups.setdefault(key, []).append((index, page))
    return list(groups.values())


_ELEMENTS = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)
"""Widest first: copies of 16 bytes reach memory speed, of single bytes a fifth of it."""
