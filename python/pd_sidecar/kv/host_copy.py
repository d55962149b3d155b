"""Moves KV between an engine's pages and the slots of a sidecar's buffer, in host memory.

The code treats pages and slots as rows of equal length. The rows are as long as the pages allow. So a single
`index_select` or `index_copy_` with row numbers makes a move, without loops over tokens, blocks or heads. The slots of
a step are usually consecutive. The rows of consecutive slots are one slice of the buffer, so the move needs no
intermediate copy.

A chunk in its slot has LMCache's format `KV_2LTD`, packed at the start: `[planes, layers, tokens, width]`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pd_sidecar.kv.layout import Geometry, LayoutError, Pages

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterable, Iterator, Sequence

    from pd_sidecar.kv.copier import Fence, Piece

MAX_ROWS = 1 << 20
"""Maximum number of rows of one move. This maximum limits the memory of the row numbers to 8 MiB."""


@dataclass(frozen=True)
class CompletedFence:
    """The fence of a move between host memories. The move is over when its call returns, so this fence is always
    done.
    """

    seconds: float

    def done(self) -> bool:
        """Returns true."""
        return True


class HostCopier:
    """Implements `copier.Copier` between host memories."""

    def __init__(self, pages: Geometry, buffer: mmap.mmap, slot_bytes: int) -> None:
        self._pages = pages
        # If a tensor is made in inference mode, torch lets no thread outside of this mode write to the tensor.
        with torch.inference_mode(False):
            data = torch.frombuffer(buffer, dtype=torch.uint8)
            self._parts = [
                _Part(pages, layers, planes, data, slot_bytes)
                for layers in _alike(pages.layers)
                for planes in _planes(layers[0][1], slot_bytes)
            ]

    def gather(
        self,
        pieces: Sequence[Piece],
        after: Iterable[object] = (),
        signal: int | None = None,
        *,
        last: bool = False,
    ) -> Fence:
        """Copies pages to slots."""
        began = time.perf_counter()
        for part, batch, slots in self._moves(pieces):
            source = part.rows_of(batch)
            if isinstance(slots, slice):
                torch.index_select(part.pages, 0, source, out=part.buffer[slots])
            else:
                _store(part.buffer, slots, part.pages.index_select(0, source))
        return CompletedFence(time.perf_counter() - began)

    def layered_copy(self, pieces: Sequence[Piece]) -> None:
        """Returns `None`: on a CPU the forward returns only when all layers are computed, so a copy by ranges gains
        nothing.
        """

    def scatter(self, pieces: Sequence[Piece], after: Iterable[object] = ()) -> Fence:
        """Copies slots to pages. Writes only the tokens that the pieces name."""
        began = time.perf_counter()
        for part, batch, slots in self._moves(pieces):
            whole = isinstance(slots, slice)
            rows = part.buffer[slots] if whole else part.buffer.index_select(0, slots)
            _store(part.pages, part.rows_of(batch), rows)
        return CompletedFence(time.perf_counter() - began)

    def _moves(self, pieces: Iterable[Piece]) -> Iterator[tuple[_Part, Batch, slice | torch.Tensor]]:
        """Yields the copies to make. Each copy is a part, a batch, and the rows of the batch in the buffer."""
        for batch in self._batches(pieces):
            for part in self._parts:
                if not (part.has_all_layers and batch.form.is_whole):
                    yield part, batch, part.rows_in_slots(batch)
                elif part.has_all_planes and batch.follow_each_other(part.rows_of_token, part.slot_rows):
                    yield part, batch, part.slice_of(batch)
                else:
                    for single in batch.singles():
                        yield part, single, part.slice_of(single)

    def _batches(self, pieces: Iterable[Piece]) -> Iterator[Batch]:
        """Groups pieces of the same form, in the order of their slots."""
        forms: dict[Form, list[Piece]] = {}
        for piece in sorted(pieces, key=lambda p: p.slot):
            forms.setdefault(Form.of(piece, self._pages.first.tokens), []).append(piece)
        for form, group in forms.items():
            rows = form.tokens * max(part.rows_of_token for part in self._parts)
            step = max(1, MAX_ROWS // rows)
            for at in range(0, len(group), step):
                yield Batch.of(form, group[at : at + step], self._pages)


class _Part:
    """Some planes (K, V or both) of the layers that have the same arrangement in the same storage; usually these are
    all layers.
    """

    def __init__(
        self,
        pages: Geometry,
        layers: list[tuple[int, Pages]],
        planes: range,
        buffer: torch.Tensor,
        slot_bytes: int,
    ) -> None:
        page = layers[0][1]
        width = _row_elements([p for _, p in layers], planes, slot_bytes)
        size = page.tensor.element_size()
        self._all_layers = len(pages.layers)
        self._layers = torch.tensor([index for index, _ in layers])
        self._planes = planes
        starts = torch.tensor([p.tensor.storage_offset() // width for _, p in layers])
        inside = page.inside[planes.start : planes.stop, :, ::width] // width
        self._block_rows = page.block_stride // width
        self._block = (starts.view(1, -1, 1, 1, 1) + inside.unsqueeze(1).unsqueeze(2)).contiguous()
        """The rows of block 0: `[plane, layer, 1, token, run]`."""
        self._runs = inside.shape[2]
        storage = torch.empty(0, dtype=torch.uint8).set_(page.tensor.untyped_storage())
        self.pages = _rows(storage, width * size)
        self.buffer = _rows(buffer, width * size)
        self.slot_rows = slot_bytes // (width * size)
        self.has_all_layers = len(layers) == len(pages.layers)
        self.has_all_planes = len(planes) == page.planes

    @property
    def rows_of_token(self) -> int:
        """The number of rows that one token has in this part."""
        return len(self._planes) * len(self._layers) * self._runs

    def rows_of(self, batch: Batch) -> torch.Tensor:
        """Returns a batch's rows in the pages, in a chunk's order: `[piece, plane, layer, token]`."""
        # First compute the rows of whole blocks. Then drop the rows of tokens that the batch does not move, in the
        # first and the last block.
        blocks = (batch.blocks * self._block_rows).view(len(batch.slots), 1, 1, -1, 1, 1)
        rows = (self._block + blocks).flatten(3, 4)
        return rows.narrow(3, batch.form.lead, batch.form.tokens).reshape(-1)

    def slice_of(self, batch: Batch) -> slice:
        """Returns the buffer's rows of a batch that fills consecutive slots."""
        rows = len(batch.slots) * batch.form.tokens * self.rows_of_token
        before = self._planes.start * self._all_layers * batch.form.tokens * self._runs
        start = batch.slots[0] * self.slot_rows + before
        return slice(start, start + rows)

    def rows_in_slots(self, batch: Batch) -> torch.Tensor:
        """Returns the numbers of the batch's rows in the buffer, in the order of `rows_of`. The batch's slots need not
        be consecutive.
        """
        planes = torch.tensor(self._planes).view(1, -1, 1, 1, 1) * self._all_layers
        layers = self._layers.view(1, 1, -1, 1, 1)
        tokens = torch.arange(batch.form.tokens).view(1, 1, 1, -1, 1) + batch.form.offset
        within = ((planes + layers) * batch.form.packed + tokens) * self._runs
        slots = torch.tensor(batch.slots).view(-1, 1, 1, 1, 1) * self.slot_rows
        return (slots + within + torch.arange(self._runs)).reshape(-1)


@dataclass(frozen=True)
class Form:
    """The properties that must be equal for all pieces that one call moves."""

    packed: int
    """The number of tokens that a slot holds."""
    offset: int
    """The first token to move, counted from the slot's first token."""
    tokens: int
    """The number of tokens to move."""
    lead: int
    """The number of tokens of the first block that come before the first token to move."""

    @classmethod
    def of(cls, piece: Piece, block_tokens: int) -> Form:
        """Returns the form of one piece."""
        (first, end), (start, stop) = piece.packed, piece.tokens
        return cls(end - first, start - first, stop - start, start % block_tokens)

    @property
    def is_whole(self) -> bool:
        """True if each piece covers all tokens that its slot holds."""
        return self.offset == 0 and self.tokens == self.packed


@dataclass(frozen=True)
class Batch:
    """Pieces of one form."""

    form: Form
    slots: list[int]
    blocks: torch.Tensor
    """The tensor's blocks that each piece touches, `[piece, block]`."""

    @classmethod
    def of(cls, form: Form, pieces: Sequence[Piece], pages: Geometry) -> Batch:
        """Makes a batch. Raises `LayoutError` if a table is too short or names a block that does not exist."""
        # Each request has a table. Concatenate the tables, and note the start of each piece's table.
        starts: dict[int, int] = {}
        tables: list[torch.Tensor] = []
        length = 0
        for piece in pieces:
            if (piece.tokens[1] - 1) // pages.block_tokens >= piece.table.numel():
                raise LayoutError(f"a table of {piece.table.numel()} blocks does not reach token {piece.tokens[1] - 1}")
            if id(piece.table) not in starts:
                starts[id(piece.table)] = length
                tables.append(piece.table)
                length += piece.table.numel()
        page = pages.first
        # One block of a table may be several blocks of the tensor.
        ratio = pages.block_tokens // page.tokens
        count = -(-(form.lead + form.tokens) // page.tokens)
        start = torch.tensor([starts[id(piece.table)] for piece in pieces]).view(-1, 1)
        first = torch.tensor([piece.tokens[0] // page.tokens for piece in pieces]).view(-1, 1)
        numbers = first + torch.arange(count)
        blocks = torch.cat(tables)[start + numbers // ratio] * ratio + numbers % ratio
        if int(blocks.max()) >= page.blocks or int(blocks.min()) < 0:
            raise LayoutError(f"a block table names a block that does not exist: there are only {page.blocks} blocks")
        return cls(form, [piece.slot for piece in pieces], blocks)

    def follow_each_other(self, rows_of_token: int, slot_rows: int) -> bool:
        """Returns true if the pieces are contiguous in the buffer."""
        apart = self.slots[-1] - self.slots[0]
        full = self.form.tokens * rows_of_token == slot_rows
        return len(self.slots) == 1 or (full and apart == len(self.slots) - 1)

    def singles(self) -> Iterator[Batch]:
        """Yields one batch per piece."""
        for i, slot in enumerate(self.slots):
            yield Batch(self.form, [slot], self.blocks[i : i + 1])


def _alike(layers: tuple[Pages, ...]) -> list[list[tuple[int, Pages]]]:
    """Groups layers that have the same arrangement in the same storage. Each layer comes with its number."""
    groups: list[list[tuple[int, Pages]]] = []
    for entry in enumerate(layers):
        page = entry[1]
        for group in groups:
            other = group[0][1]
            if (
                page.tensor.untyped_storage().data_ptr() == other.tensor.untyped_storage().data_ptr()
                and page.block_stride == other.block_stride
                and torch.equal(page.inside, other.inside)
            ):
                group.append(entry)
                break
        else:
            groups.append([entry])
    return groups


def _planes(page: Pages, slot_bytes: int) -> list[range]:
    """Returns K and V as one range of planes if their rows have the same length, otherwise as two ranges."""
    each = [range(plane, plane + 1) for plane in range(page.planes)]
    if len({_row_elements([page], plane, slot_bytes) for plane in each}) == 1:
        return [range(page.planes)]
    return each


def _row_elements(layers: list[Pages], planes: range, slot_bytes: int) -> int:
    """Returns the largest row length, in elements, that divides the start and the length of each contiguous run of a
    token's elements.
    """
    page = layers[0]
    inside = page.inside[planes.start : planes.stop]
    total = inside.shape[2]
    # The positions at which a run ends, in the order of a chunk.
    ends = (inside[:, :, 1:] != inside[:, :, :-1] + 1).any(0).any(0).nonzero().view(-1) + 1
    width = math.gcd(total, slot_bytes // page.tensor.element_size(), page.block_stride)
    width = math.gcd(width, *ends.tolist(), *(p.tensor.storage_offset() for p in layers))
    return math.gcd(width, *inside[:, :, ::width].unique().tolist())


def _rows(data: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the data as rows of `width` bytes. Uses the widest element type that divides a row."""
    element = next(e for e in _ELEMENTS if width % e.itemsize == 0)
    rows = data[: data.numel() // width * width].view(element)
    # Use one dimension if a row is one element: two dimensions are several times slower.
    return rows if width == element.itemsize else rows.view(-1, width // element.itemsize)


def _store(rows: torch.Tensor, numbers: torch.Tensor, values: torch.Tensor) -> None:
    if rows.dim() == 1:
        rows.scatter_(0, numbers, values)
    else:
        rows.index_copy_(0, numbers, values)


_ELEMENTS = (torch.complex128, torch.int64, torch.int32, torch.int16, torch.uint8)
"""Widest first: a copy of 16-byte elements reaches the memory's speed; a copy of single bytes reaches only a fifth of
this speed.
"""
