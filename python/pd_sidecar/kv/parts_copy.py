"""Moves KV of several groups between an engine's pages and the slots of a sidecar's buffer, in host memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from pd_sidecar.kv.host_copy import CompletedFence
from pd_sidecar.kv.layout import LayoutError
from pd_sidecar.kv.states import States

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterable, Sequence

    from pd_sidecar.kv.copier import Fence, Piece
    from pd_sidecar.kv.layout import Geometry
    from pd_sidecar.kv.parts import Parts


class PartsCopier:
    """Implements `copier.Copier` for layouts with groups."""

    def __init__(self, parts: Parts, buffer: mmap.mmap, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        with torch.inference_mode(False):
            data = torch.frombuffer(buffer, dtype=torch.uint8)
            self._movers = [
                _StateMover(part.pages, data) if isinstance(part.pages, States) else _TokenMover(part.pages, data)
                for part in parts.parts
            ]

    def gather(
        self, pieces: Sequence[Piece], after: Iterable[object] = (), signal: int | None = None, *, last: bool = False
    ) -> Fence:
        """Copies pages to slots."""
        began = time.perf_counter()
        for piece in pieces:
            self._movers[piece.part].gather(piece, piece.slot * self._slot_bytes + piece.offset)
        return CompletedFence(time.perf_counter() - began)

    def layered_copy(self, pieces: Sequence[Piece]) -> None:
        """Returns `None`: layouts with groups are not gathered by layers."""

    def scatter(self, pieces: Sequence[Piece], after: Iterable[object] = ()) -> Fence:
        """Copies slots to pages. Writes only the tokens that the pieces name."""
        began = time.perf_counter()
        for piece in pieces:
            self._movers[piece.part].scatter(piece, piece.slot * self._slot_bytes + piece.offset)
        return CompletedFence(time.perf_counter() - began)


class _TokenMover:
    def __init__(self, pages: Geometry, data: torch.Tensor) -> None:
        self._pages = pages
        self._data = data
        self._flat = [_flat(page.tensor) for page in pages.layers]

    def gather(self, piece: Piece, at: int) -> None:
        slot, places = self._slot(piece, at), self._places(piece)
        for layer, flat in enumerate(self._flat):
            slot[:, layer] = flat[places[layer]]

    def scatter(self, piece: Piece, at: int) -> None:
        slot, places = self._slot(piece, at), self._places(piece)
        for layer, flat in enumerate(self._flat):
            flat[places[layer]] = slot[:, layer]

    def _slot(self, piece: Piece, at: int) -> torch.Tensor:
        page, tokens = self._pages.first, piece.packed[1] - piece.packed[0]
        size = self._pages.token_bytes * tokens
        shape = (page.planes, len(self._flat), tokens, page.heads * page.head_size)
        whole = self._data[at : at + size].view(page.tensor.dtype).view(shape)
        first, last = (token - piece.packed[0] for token in piece.tokens)
        return whole[:, :, first:last]

    def _places(self, piece: Piece) -> list[torch.Tensor]:
        pages = self._pages
        if not piece.has_blocks(pages.block_tokens):
            raise LayoutError(f"the block table has no block for one of the tokens {piece.tokens}")
        positions = torch.arange(*piece.tokens)
        blocks = piece.table[positions // pages.block_tokens]
        places = []
        for page in pages.layers:
            ratio = pages.block_tokens // page.tokens
            own = blocks * ratio + positions % pages.block_tokens // page.tokens
            if int(own.max()) >= page.blocks:
                raise LayoutError(f"a block table names block {int(own.max())}, but there are only {page.blocks}")
            places.append(page.inside[:, positions % page.tokens] + (own * page.block_stride).view(1, -1, 1))
        return places


class _StateMover:
    def __init__(self, states: States, data: torch.Tensor) -> None:
        self._data = data
        self._tensors = [tensor for layer in states.layers for tensor in layer]

    def gather(self, piece: Piece, at: int) -> None:
        block = _block(piece)
        whole = torch.cat([tensor[block].contiguous().view(-1).view(torch.uint8) for tensor in self._tensors])
        self._data[at : at + piece.bytes] = whole[piece.start : piece.start + piece.bytes]

    def scatter(self, piece: Piece, at: int) -> None:
        block, end, first = _block(piece), piece.start + piece.bytes, 0
        for tensor in self._tensors:
            own = tensor[block].contiguous()
            flat = own.view(-1).view(torch.uint8)
            begin, stop = max(piece.start, first), min(end, first + flat.numel())
            if begin < stop:
                source = at + begin - piece.start
                flat[begin - first : stop - first] = self._data[source : source + stop - begin]
                tensor[block] = own
            first += flat.numel()


def _block(piece: Piece) -> int:
    if not piece.has_blocks(0):
        raise LayoutError("the block table has no block for the state")
    return int(piece.table[-1])


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor's storage from its first element on."""
    offset = tensor.storage_offset()
    size = tensor.untyped_storage().nbytes() // tensor.element_size() - offset
    return tensor.as_strided((size,), (1,), offset)
