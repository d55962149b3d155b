"""Divides an engine's KV into the groups of a layout.

A layer belongs to one of vLLM's KV cache groups, which has a block table of its own. Layers of one vLLM group that
differ in shape or dtype become several groups of the layout, with the same table.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from pd_sidecar.kv.layout import DTYPE_NAMES, Geometry, Hint, LayoutError, geometry
from pd_sidecar.kv.states import States, states
from pd_sidecar.sidecar import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from pd_sidecar.kv.layout import Writer
    from pd_sidecar.kv.quantization import Quantization

    Writers = Callable[[Mapping[str, torch.Tensor], Hint], Mapping[str, Writer]]


@dataclass(frozen=True)
class GroupPart:
    """The layers of one group of the layout."""

    table: int
    """The index of the vLLM group that has the block table."""
    kind: str
    """As `wire.Group.kind`."""
    pages: Geometry | States
    size: int = 0
    """As `wire.Group.size`."""

    @property
    def group(self) -> wire.Group:
        """The group as the sidecars see it."""
        pages = self.pages
        return wire.Group(self.kind, pages.bytes if isinstance(pages, States) else pages.token_bytes, self.size)


@dataclass(frozen=True)
class Parts:
    """The groups of one worker's KV, in the layout's order."""

    parts: tuple[GroupPart, ...]

    @classmethod
    def one(cls, pages: Geometry) -> Parts:
        """Returns the parts of KV that is one group of full attention."""
        return cls((GroupPart(0, "full", pages),))

    @property
    def is_one(self) -> bool:
        """True for one group of full attention, whose layout has no `groups`."""
        return len(self.parts) == 1 and self.parts[0].kind == "full"

    @property
    def only(self) -> Geometry:
        """The layers of the only group."""
        pages = self.parts[0].pages
        if not self.is_one or isinstance(pages, States):
            raise LayoutError(f"{len(self.parts)} groups of layers cannot be treated as one")
        return pages

    @property
    def groups(self) -> tuple[wire.Group, ...]:
        """The groups as the sidecars see them."""
        return tuple(part.group for part in self.parts)

    @property
    def tables(self) -> tuple[int, ...]:
        """For each group, the index of the vLLM group that has its block table."""
        return tuple(part.table for part in self.parts)

    @property
    def block_tokens(self) -> tuple[int, ...]:
        """For each group, the number of tokens of a block of its table; 0 for states."""
        return tuple(0 if isinstance(part.pages, States) else part.pages.block_tokens for part in self.parts)

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        pages = self.parts[0].pages
        return pages.layers[0][0].device if isinstance(pages, States) else pages.first.tensor.device

    def quantized(self, of: Callable[[Geometry], Quantization | None]) -> Parts:
        """Returns the same parts with the number format that `of` finds for each group's layers."""

        def found(part: GroupPart) -> GroupPart:
            pages = part.pages
            return part if isinstance(pages, States) else replace(part, pages=replace(pages, quantization=of(pages)))

        return Parts(tuple(found(part) for part in self.parts))

    def of_heads(self, heads: range) -> Parts:
        """Returns the same tensors with only these heads. Raises `LayoutError` for several groups."""
        return Parts.one(self.only.of_heads(heads))

    def layout(self, model: str, chunk_tokens: int) -> wire.Layout:
        """Returns the format of a chunk, which the sidecars compare."""
        if self.is_one:
            return self.only.layout(model, chunk_tokens)
        layouts = [_layout(part, model, chunk_tokens) for part in self.parts]
        first = layouts[0]
        # With the names, two engines that divide equal layers into groups in different ways refuse each other.
        described = [(part.group, layout, part.pages.names) for part, layout in zip(self.parts, layouts, strict=True)]
        digest = hashlib.sha256(repr(described).encode()).hexdigest()[:16]
        texts = sorted({layout.quantization for layout in layouts if layout.quantization})
        return wire.Layout(
            model=model,
            dtype=first.dtype,
            layers=first.layers,
            kv_heads=first.kv_heads,
            head_size=first.head_size,
            mla=first.mla,
            chunk_tokens=chunk_tokens,
            quantization=" ".join([*texts, f"groups:{digest}"]),
            groups=list(self.groups),
        )


def _layout(part: GroupPart, model: str, chunk_tokens: int) -> wire.Layout:
    pages = part.pages
    if isinstance(pages, Geometry):
        return pages.layout(model, chunk_tokens)
    # The device is part of the format: in the state of a gated delta net, vLLM's kernels for CPUs and for GPUs store
    # keys and values in different orders.
    device, dtype = pages.layers[0][0].device, pages.layers[0][0].dtype
    shapes = "; ".join([*(f"{name} {shape}" for name, shape in pages.shapes), device.type])
    return wire.Layout(
        model,
        DTYPE_NAMES.get(dtype, str(dtype)),
        len(pages.layers),
        1,
        pages.bytes,
        mla=True,
        chunk_tokens=chunk_tokens,
        quantization=shapes,
    )


def parts_of(
    tensors: Mapping[str, Any], groups: Sequence[Any], num_blocks: int, block_tokens: int, writers: Writers
) -> Parts:
    """Returns the groups of a worker's KV. Raises `LayoutError` for KV that cannot be moved.

    `groups` are vLLM's KV cache groups, `block_tokens` is the size of a block if there is only one of them.
    """
    found: list[GroupPart] = []
    for table, group in enumerate(groups):
        if not getattr(group, "enable_kv_transfer", True) or getattr(group, "host_resident", False):
            raise LayoutError(f"vLLM excludes the KV of {group.layer_names[0]} from transfers")
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        alike: dict[Any, list[str]] = {}
        for name in group.layer_names:
            if name in tensors:
                alike.setdefault(specs[name] if specs else group.kv_cache_spec, []).append(name)
        for spec, names in alike.items():
            own = {name: tensors[name] for name in names}
            block = block_tokens if len(groups) == 1 else spec.block_size
            if isinstance(spec, MambaSpec):
                found.append(GroupPart(table, "state", states(own, spec)))
                continue
            hint = _hint(spec, num_blocks, block)
            kind, size = _kind(spec)
            found.append(GroupPart(table, kind, geometry(own, hint, writers(own, hint)), size))
    if not found:
        raise LayoutError("the engine has no KV tensors")
    _check_alignment(found)
    return Parts(tuple(found))


def without_draft(tensors: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Returns the tensors of the model itself, which has `layers` layers. vLLM numbers the layers of a draft model
    after the layers of the model, or names them `mtp`.
    """

    def is_draft(name: str) -> bool:
        number = LAYER.search(name)
        return "mtp" in name.split(".") or (number is not None and int(number[1]) >= layers)

    return {name: tensor for name, tensor in tensors.items() if not is_draft(name)}


def _check_alignment(parts: Sequence[GroupPart]) -> None:
    """Checks that each group begins at a multiple of its elements' size in every slot. Raises `LayoutError`."""
    for part in parts:
        for other in parts:
            if isinstance(part.pages, States) or isinstance(other.pages, States):
                continue
            size = part.pages.first.tensor.element_size()
            if other.pages.token_bytes % size:
                raise LayoutError(
                    f"{other.pages.names[0]}: {other.pages.token_bytes} bytes of a token are no multiple of the "
                    f"{size} bytes of an element of {part.pages.names[0]}"
                )


def _kind(spec: AttentionSpec) -> tuple[str, int]:
    if isinstance(spec, SlidingWindowSpec):
        return "window", spec.sliding_window
    if isinstance(spec, ChunkedLocalAttentionSpec):
        return "chunked", spec.attention_chunk_size
    if isinstance(spec, FullAttentionSpec):
        return "full", 0
    raise LayoutError(f"the connector does not move KV caches of kind {type(spec).__name__}")


def _hint(spec: Any, num_blocks: int, block_tokens: int) -> Hint:
    """Returns vLLM's description of the layers. Raises `LayoutError`."""
    if not isinstance(spec, AttentionSpec) or getattr(spec, "tokens_per_state", 1) != 1:
        raise LayoutError(f"the connector does not move KV caches of kind {type(spec).__name__}")
    if (slots := getattr(spec, "num_head_slots", None)) is not None:
        # The tensor's shape does not show whether a place is a head: pages with as many heads as places have the
        # same shape.
        raise LayoutError(f"pages of {spec.num_kv_heads} KV heads have {slots} places instead of one per head")
    return Hint(num_blocks, block_tokens, spec.num_kv_heads, spec.head_size, isinstance(spec, MLAAttentionSpec))


LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")
"""The number of a layer in its name."""
