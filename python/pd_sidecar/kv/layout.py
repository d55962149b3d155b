"""Finds the place of KV in an engine's tensors, and derives the format of its chunks.

The places follow from the tensors' shapes and strides. If the shapes and strides allow several interpretations, the
engine's own description (`Hint`) decides between them. Strides can be wrong about the inside of a page: vLLM's CPU
kernels store K there column by column, or in tiles. If the engine's own kernel is available, `probe` uses this kernel
to find the real places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pd_sidecar.sidecar import wire

if TYPE_CHECKING:
    from pd_sidecar.kv.quantization import Quantization

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
"""LMCache's names of the dtypes, for keys and for the layout."""


class LayoutError(ValueError):
    """The connector cannot move these tensors. The text names the layer and the reason."""


@dataclass(frozen=True)
class Hint:
    """The engine's own description of its cache."""

    num_blocks: int
    block_tokens: int
    kv_heads: int
    head_size: int
    mla: bool


@dataclass(frozen=True)
class Pages:
    """The places of one layer's KV in its storage. Offsets and strides are in elements."""

    tensor: torch.Tensor
    blocks: int
    tokens: int
    heads: int
    head_size: int
    planes: int
    block_stride: int
    inside: torch.Tensor
    """The offset of each element `[plane, token, head * head_size]` within a block."""

    def of_heads(self, heads: range) -> Pages:
        """Returns the same pages with only these heads. Raises `IndexError` if there are no such heads."""
        if not 0 <= heads.start < heads.stop <= self.heads:
            raise IndexError(f"heads {heads} are not within the {self.heads} heads")
        inside = self.inside.unflatten(2, (self.heads, self.head_size))
        inside = inside[:, :, heads.start : heads.stop].flatten(2).contiguous()
        return replace(self, heads=len(heads), inside=inside)

    @property
    def block_axis(self) -> int:
        """The index of the tensor's dimension that counts blocks."""
        sizes = zip(self.tensor.shape, self.tensor.stride(), strict=True)
        return next(axis for axis, size in enumerate(sizes) if size == (self.blocks, self.block_stride))

    @property
    def shape(self) -> tuple[object, ...]:
        """The properties that must be the same for all layers of a model."""
        return (
            self.tensor.dtype,
            self.blocks,
            self.tokens,
            self.heads,
            self.head_size,
            self.planes,
        )


Writer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""The engine's own function that stores K and V `[tokens, heads, size]` in a cache, by slot numbers."""


@dataclass(frozen=True)
class Geometry:
    """The KV tensors of one worker, layer by layer."""

    layers: tuple[Pages, ...]
    block_tokens: int
    """The number of tokens in one block of the block tables. A tensor's own blocks may be smaller."""
    names: tuple[str, ...] = ()
    """The names of the layers."""
    quantization: Quantization | None = None
    """The number format, if the tensors hold bytes; otherwise `None`."""

    @property
    def first(self) -> Pages:
        """The first layer. All layers have the same shape."""
        return self.layers[0]

    @property
    def token_bytes(self) -> int:
        """The bytes of KV of one token over all layers."""
        page = self.first
        width = page.planes * page.heads * page.head_size * page.tensor.element_size()
        return len(self.layers) * width

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies whole blocks of the block tables to other blocks of the same tensors. On a GPU the copy runs after the
        work that the calling thread has launched, and before the work that it launches later.
        """
        page = self.first
        each = torch.arange(self.block_tokens // page.tokens)
        own = [(torch.tensor(list(ids)).view(-1, 1) * len(each) + each).view(-1) for ids in (sources, targets)]
        source, target = (ids.to(page.tensor.device) for ids in own)
        for layer in self.layers:
            # Not every device copies numbers of 8 bits by index.
            tensor = layer.tensor.view(torch.uint8) if layer.tensor.element_size() == 1 else layer.tensor
            axis = layer.block_axis
            tensor.index_copy_(axis, target, tensor.index_select(axis, source))

    def of_heads(self, heads: range) -> Geometry:
        """Returns the same tensors with only these heads."""
        return replace(
            self,
            layers=tuple(page.of_heads(heads) for page in self.layers),
            quantization=self.quantization and self.quantization.of_heads(heads),
        )

    def layout(self, model: str, chunk_tokens: int) -> wire.Layout:
        """Returns the format of a chunk, which the sidecars compare."""
        page = self.first
        return wire.Layout(
            model=model,
            dtype=DTYPE_NAMES[page.tensor.dtype],
            layers=len(self.layers),
            kv_heads=page.heads,
            head_size=page.head_size,
            mla=page.planes == 1,
            chunk_tokens=chunk_tokens,
            quantization=str(self.quantization or ""),
        )


def geometry(tensors: Mapping[str, torch.Tensor], hint: Hint, writers: Mapping[str, Writer] | None = None) -> Geometry:
    """Returns the geometry of a worker's KV tensors, by layer name. Raises `LayoutError`.

    For layers that have a writer, `probe` finds the places; for the other layers, the strides give the places.

    Layers are in the order of the numbers in their names, on both sides of a transfer. Names that share a tensor
    (layers that reuse another layer's KV) count once.
    """
    layers: list[Pages] = []
    names: list[str] = []
    seen: set[tuple[object, ...]] = set()
    writers = writers or {}
    for name in sorted(tensors, key=_natural):
        tensor = tensors[name]
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place in seen:
            continue
        seen.add(place)
        names.append(name)
        pages = _pages(name, tensor, hint)
        if name in writers:
            pages = replace(pages, inside=probe(name, pages, writers[name]))
        layers.append(pages)
        if layers[-1].shape != layers[0].shape:
            raise LayoutError(f"{name}: shape {layers[-1].shape}, but the first layer has {layers[0].shape}")
    if not layers:
        raise LayoutError("the engine has no KV tensors")
    if hint.block_tokens % layers[0].tokens != 0:
        raise LayoutError(
            f"blocks of {hint.block_tokens} tokens are no multiple of the tensor's blocks of {layers[0].tokens} tokens"
        )
    return Geometry(tuple(layers), hint.block_tokens, tuple(names))


def chunks_of(tokens: int, chunk_tokens: int) -> int:
    """Returns the number of chunks that `tokens` tokens need."""
    return -(-tokens // chunk_tokens)


def chunk_span(index: int, tokens: int, first_token: int, chunk_tokens: int) -> tuple[int, int]:
    """Returns the tokens `[from, to)` that chunk `index` of a request of `tokens` tokens holds.

    The decode side already has the first `first_token` tokens. So the chunk that contains token `first_token` begins
    with this token.
    """
    start = index * chunk_tokens
    stop = min(start + chunk_tokens, tokens)
    return min(max(start, first_token), stop), stop


def wanted_chunks(tokens: int, have_tokens: int, chunk_tokens: int) -> range:
    """Returns the chunks that contain tokens after the first `have_tokens` tokens."""
    if have_tokens >= tokens:
        return range(0)
    return range(have_tokens // chunk_tokens, chunks_of(tokens, chunk_tokens))


def _pages(name: str, tensor: torch.Tensor, hint: Hint) -> Pages:
    if tensor.device.type not in ("cpu", "cuda"):
        raise LayoutError(f"{name}: KV is on {tensor.device}; this version moves KV in host memory and on CUDA GPUs")
    if tensor.dtype not in DTYPE_NAMES:
        raise LayoutError(f"{name}: keys have no name for dtype {tensor.dtype}")
    shape, stride = tuple(tensor.shape), tensor.stride()
    block, token, head, plane, size = _axes(name, shape, hint)
    # If the tensor has no dimension for K and V, V follows K within a head.
    planes = 1 if hint.mla else 2
    plane_stride = size if plane is None else stride[plane]
    head_stride = 0 if head is None else stride[head]
    heads = 1 if head is None else shape[head]
    inside = (
        torch.arange(planes).view(-1, 1, 1, 1) * plane_stride
        + torch.arange(shape[token]).view(1, -1, 1, 1) * stride[token]
        + torch.arange(heads).view(1, 1, -1, 1) * head_stride
        + torch.arange(size) * stride[-1]
    )
    return Pages(
        tensor=tensor,
        blocks=shape[block],
        tokens=shape[token],
        heads=heads,
        head_size=size,
        planes=planes,
        block_stride=stride[block],
        inside=inside.view(planes, shape[token], heads * size),
    )


def probe(name: str, pages: Pages, write: Writer) -> torch.Tensor:
    """Finds the places to which the engine's own kernel writes. Stores a number for each element, and searches for the
    numbers.

    Each call of the kernel stores one digit of every number. The digits are so small that every dtype holds them
    exactly. Raises `LayoutError` if a number does not appear exactly once.
    """
    tensor, per_plane = pages.tensor, pages.inside[0].numel()
    numbers = torch.arange(2 * per_plane)
    # Use block 1 of 2, so that the probe also covers the stride between blocks.
    cache = torch.empty_strided((2, *tensor.shape[1:]), tensor.stride(), dtype=tensor.dtype)
    storage = torch.empty(0, dtype=tensor.dtype).set_(cache.untyped_storage())
    slots = torch.arange(pages.tokens, 2 * pages.tokens)
    found = torch.zeros(storage.numel(), dtype=torch.int64)
    stored = torch.ones(storage.numel(), dtype=torch.bool)
    for place in range(_digits(2 * per_plane)):
        digit = (numbers // PROBE_BASE**place % PROBE_BASE + 1).to(tensor.dtype)
        key, value = digit.view(2, pages.tokens, pages.heads, pages.head_size)
        storage.zero_()
        try:
            write(key.contiguous(), value.contiguous(), cache, slots)
        except (RuntimeError, TypeError, ValueError) as error:
            raise LayoutError(f"{name}: the engine cannot store test values as K and V: {error}") from error
        read = storage.to(torch.float64)
        stored &= (read >= 1) & (read <= PROBE_BASE)
        found += (read.to(torch.int64) - 1) * PROBE_BASE**place
    places = stored.nonzero().view(-1)
    if not torch.equal(found[places].sort().values, numbers):
        raise LayoutError(f"{name}: the engine stores other values than the given K and V")
    inside = torch.empty_like(numbers)
    inside[found[places]] = places - pages.block_stride
    if int(inside.min()) < 0:
        raise LayoutError(f"{name}: the engine stores values in other blocks than the tensor's shape has")
    return inside.view(pages.inside.shape)


def _digits(numbers: int) -> int:
    digits = 1
    while PROBE_BASE**digits < numbers:
        digits += 1
    return digits


def _axes(name: str, shape: tuple[int, ...], hint: Hint) -> tuple[int, int, int | None, int | None, int]:
    """Returns the dimensions of block, token, head and plane (K or V), and the size of a head."""

    def blocks(size: int) -> bool:
        return size > 0 and size % hint.num_blocks == 0

    if hint.mla:
        if len(shape) == 3 and blocks(shape[0]):
            return 0, 1, None, None, shape[2]
        if len(shape) == 4 and blocks(shape[0]) and shape[1] == 1:
            return 0, 2, None, None, shape[3]
    elif len(shape) == 4:
        # The shape is [blocks, heads, tokens, K and V of a head]: in all of vLLM from 0.28 on, and in older versions of
        # its CPU backend.
        if blocks(shape[0]) and shape[1] == hint.kv_heads and shape[3] == 2 * hint.head_size:
            return 0, 2, 1, None, hint.head_size
    elif len(shape) == 5 and shape[4] == hint.head_size:
        # The GPU backends have [blocks, 2, tokens, heads, size]. Before vLLM 0.24 the GPU backends had [2, blocks,
        # ...]. The CPU backend had heads before tokens. If there are as many heads as tokens, take the order of the GPU
        # backends.
        for block, plane in ((0, 1), (1, 0)):
            if shape[plane] == 2 and blocks(shape[block]):
                if shape[3] == hint.kv_heads:
                    return block, 2, 3, plane, shape[4]
                if shape[2] == hint.kv_heads:
                    return block, 3, 2, plane, shape[4]
    raise LayoutError(f"{name}: the shape {shape} does not fit KV of {hint}")


def _natural(name: str) -> list[tuple[int, str]]:
    """Returns a key that sorts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


PROBE_BASE = 128
"""The base of the digits. The probe stores digit + 1, at most 128, which bfloat16 and float16 hold exactly."""
