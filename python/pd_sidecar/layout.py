"""Where KV lies in an engine's tensors, and what a chunk of it looks like.

Everything is read from shapes and strides. The engine's own description (`Hint`) only decides
between readings that the shape alone leaves open, so that a new page layout with the same logical
shape needs no change here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import wire

if TYPE_CHECKING:
    from collections.abc import Mapping

DTYPE_NAMES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.float16: "half",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.float8_e4m3fn: "fp8_e4m3fn",
    torch.float8_e4m3fnuz: "fp8_e4m3fnuz",
    torch.float8_e5m2: "fp8_e5m2",
    torch.float8_e5m2fnuz: "fp8_e5m2fnuz",
}
"""LMCache's names, which stand in keys and in the layout."""


class LayoutError(ValueError):
    """These tensors cannot be moved; the text names the layer and what is in the way."""


@dataclass(frozen=True)
class Hint:
    """What the engine says of its cache."""

    num_blocks: int
    block_tokens: int
    kv_heads: int
    head_size: int
    mla: bool


@dataclass(frozen=True)
class Pages:
    """Where one layer's KV lies in its storage. Offset and strides are in elements."""

    tensor: torch.Tensor
    blocks: int
    tokens: int
    heads: int
    head_size: int
    planes: int
    block_stride: int
    token_stride: int
    head_stride: int
    plane_stride: int

    @property
    def shape(self) -> tuple[object, ...]:
        """What must be the same for all layers of a model."""
        return (
            self.tensor.dtype,
            self.blocks,
            self.tokens,
            self.heads,
            self.head_size,
            self.planes,
        )


@dataclass(frozen=True)
class Geometry:
    """The KV tensors of one worker, layer by layer."""

    layers: tuple[Pages, ...]
    block_tokens: int
    """Tokens of a block as the block tables count them; a tensor's own blocks may be smaller."""

    @property
    def first(self) -> Pages:
        """Any layer: all have the same shape."""
        return self.layers[0]

    @property
    def token_bytes(self) -> int:
        """Bytes of KV of one token over all layers."""
        page = self.first
        width = page.planes * page.heads * page.head_size * page.tensor.element_size()
        return len(self.layers) * width

    def layout(self, model: str, chunk_tokens: int) -> wire.Layout:
        """The shape of a chunk, as the sidecars compare it."""
        page = self.first
        return wire.Layout(
            model=model,
            dtype=DTYPE_NAMES[page.tensor.dtype],
            layers=len(self.layers),
            kv_heads=page.heads,
            head_size=page.head_size,
            mla=page.planes == 1,
            chunk_tokens=chunk_tokens,
        )


def geometry(tensors: Mapping[str, torch.Tensor], hint: Hint) -> Geometry:
    """The geometry of a worker's KV tensors, by layer name. Raises `LayoutError`.

    Layers stand in the order of the numbers in their names, on both sides of a transfer. Names
    that share a tensor (layers that reuse another layer's KV) count once.
    """
    layers: list[Pages] = []
    seen: set[tuple[object, ...]] = set()
    for name in sorted(tensors, key=_natural):
        tensor = tensors[name]
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place in seen:
            continue
        seen.add(place)
        layers.append(_pages(name, tensor, hint))
        if layers[-1].shape != layers[0].shape:
            raise LayoutError(f"{name}: {layers[-1].shape} differs from {layers[0].shape}")
    if not layers:
        raise LayoutError("the engine has no KV tensors")
    if hint.block_tokens % layers[0].tokens != 0:
        raise LayoutError(
            f"{hint.block_tokens} tokens a block are no multiple of the tensor's {layers[0].tokens}"
        )
    return Geometry(tuple(layers), hint.block_tokens)


def chunks_of(tokens: int, chunk_tokens: int) -> int:
    """Chunks that `tokens` tokens need."""
    return -(-tokens // chunk_tokens)


def chunk_span(index: int, tokens: int, first_token: int, chunk_tokens: int) -> tuple[int, int]:
    """The tokens `[from, to)` that chunk `index` holds, of a request of `tokens` tokens.

    The decode side has the first `first_token` of them: the chunk with that mark begins there.
    """
    start = index * chunk_tokens
    stop = min(start + chunk_tokens, tokens)
    return min(max(start, first_token), stop), stop


def wanted_chunks(tokens: int, have_tokens: int, chunk_tokens: int) -> range:
    """The chunks whose end lies beyond `have_tokens`."""
    if have_tokens >= tokens:
        return range(0)
    return range(have_tokens // chunk_tokens, chunks_of(tokens, chunk_tokens))


def _pages(name: str, tensor: torch.Tensor, hint: Hint) -> Pages:
    if tensor.dtype not in DTYPE_NAMES:
        raise LayoutError(f"{name}: dtype {tensor.dtype} has no name in keys")
    shape, stride = tuple(tensor.shape), tensor.stride()
    block, token, head, plane, size = _axes(name, shape, hint)
    if stride[-1] != 1:
        raise LayoutError(f"{name}: the last dimension has stride {stride[-1]}")
    packed = plane is None and not hint.mla
    return Pages(
        tensor=tensor,
        blocks=shape[block],
        tokens=shape[token],
        heads=1 if head is None else shape[head],
        head_size=size,
        planes=1 if hint.mla else 2,
        block_stride=stride[block],
        token_stride=stride[token],
        head_stride=size if head is None else stride[head],
        plane_stride=size if packed else 0 if plane is None else stride[plane],
    )


def _axes(
    name: str, shape: tuple[int, ...], hint: Hint
) -> tuple[int, int, int | None, int | None, int]:
    """Which dimension is block, token, head and plane (K or V), and the size of a head."""

    def blocks(size: int) -> bool:
        return size > 0 and size % hint.num_blocks == 0

    if hint.mla:
        if len(shape) == 3 and blocks(shape[0]):
            return 0, 1, None, None, shape[2]
        if len(shape) == 4 and blocks(shape[0]) and shape[1] == 1:
            return 0, 2, None, None, shape[3]
    elif len(shape) == 4:
        # [blocks, heads, tokens, K and V of a head]: vLLM from 0.28 on, its CPU backend earlier.
        if blocks(shape[0]) and shape[1] == hint.kv_heads and shape[3] == 2 * hint.head_size:
            return 0, 2, 1, None, hint.head_size
    elif len(shape) == 5 and shape[4] == hint.head_size:
        # [blocks, 2, tokens, heads, size] and, before 0.24, [2, blocks, ...]. The CPU backend had
        # heads before tokens. With as many heads as tokens the order is the GPU backends'.
        for block, plane in ((0, 1), (1, 0)):
            if shape[plane] == 2 and blocks(shape[block]):
                if shape[3] == hint.kv_heads:
                    return block, 2, 3, plane, shape[4]
                if shape[2] == hint.kv_heads:
                    return block, 3, 2, plane, shape[4]
    raise LayoutError(f"{name}: shape {shape} cannot be read as KV of {hint}")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def row_bytes(layers: tuple[Pages, ...], slot_bytes: int) -> int:
    """The longest run of bytes that is one piece in every layer and starts at a multiple of itself.

    Heads that lie side by side are one run; otherwise a run is one head of K or V.
    """
    page = layers[0]
    size = page.tensor.element_size()
    run = page.head_size
    side_by_side = all(layer.head_stride == layer.head_size for layer in layers)
    if side_by_side:
        run *= page.heads
    strides = [
        stride
        for layer in layers
        for stride in (
            layer.tensor.storage_offset(),
            layer.block_stride,
            layer.token_stride,
            0 if side_by_side else layer.head_stride,
            layer.plane_stride,
        )
    ]
    return math.gcd(slot_bytes, run * size, *(stride * size for stride in strides))
