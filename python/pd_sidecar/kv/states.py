"""Finds the states of recurrent layers in an engine's tensors.

A state is a few tensors of fixed size: the inputs of the convolution, and the sum that the layer carries on. The sum
has one shape everywhere. The inputs lie in the order (tokens, channels) or (channels, tokens), which vLLM chooses on
each side; they travel as (tokens, channels).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pd_sidecar.kv.layout import LayoutError, _natural

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class States:
    """The states of one group, layer by layer. Each tensor's first dimension counts blocks."""

    layers: tuple[tuple[torch.Tensor, ...], ...]
    """Views of the engine's tensors in the order in which they travel."""
    names: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """The bytes of one request's state in all layers."""
        return sum(tensor[0].numel() * tensor.element_size() for layer in self.layers for tensor in layer)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies the states in some blocks to other blocks, in the order of `Geometry.copy_blocks`."""
        for tensor in (tensor for layer in self.layers for tensor in layer):
            source, target = (torch.tensor(list(ids), device=tensor.device) for ids in (sources, targets))
            tensor.index_copy_(0, target, tensor.index_select(0, source))

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """The dtype and the shape of each tensor, which must be equal on both sides."""
        return [(str(tensor.dtype), tuple(tensor.shape[1:])) for layer in self.layers for tensor in layer]


def states(tensors: Mapping[str, torch.Tensor | Sequence[torch.Tensor]], spec: Any) -> States:
    """Returns the states of one group's layers. Raises `LayoutError` for states of an unknown form."""
    if len(spec.shapes) > 2 or (len(spec.shapes) == 2 and len(spec.shapes[0]) != 2):
        raise LayoutError(f"the connector does not move states of the shapes {spec.shapes}")
    if spec.mamba_type.name not in MOVED:
        raise LayoutError(
            f"the connector does not move states of kind {spec.mamba_type.name}: not tested with an engine"
        )
    if spec.num_speculative_blocks:
        raise LayoutError("the connector does not move states beside speculative decoding: not tested with an engine")
    has_convolution = len(spec.shapes[0]) == 2
    names = sorted(tensors, key=_natural)
    layers = []
    for name in names:
        own = _split(name, tensors[name], spec)
        if [tuple(tensor.shape[1:]) for tensor in own] != [tuple(shape) for shape in spec.shapes]:
            raise LayoutError(f"{name}: states of {[tuple(t.shape) for t in own]} do not fit {spec.shapes}")
        is_on_cpu = own[0].device.type == "cpu"
        if is_on_cpu and spec.mamba_cache_mode != "none" and spec.mamba_type.name in UNCACHED:
            raise LayoutError(f"{UNCACHED[spec.mamba_type.name]}: set --no-enable-prefix-caching on both sides")
        if has_convolution and _is_channels_first():
            own[0] = own[0].transpose(1, 2)
        layers.append(tuple(own))
    return States(tuple(layers), tuple(names))


def _split(name: str, pages: torch.Tensor | Sequence[torch.Tensor], spec: Any) -> list[torch.Tensor]:
    """Returns the tensors of one layer's state. vLLM gives them to connectors as one tensor of bytes, in which the
    tensors of a block follow each other.
    """
    if not isinstance(pages, torch.Tensor):
        return list(pages)
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)]
    if pages.element_size() != 1 or pages[0].numel() != sum(sizes):
        raise LayoutError(f"{name}: pages {tuple(pages.shape)} of {pages.dtype} do not fit states {spec.shapes}")
    found, first, flat = [], 0, pages.flatten(1)
    for shape, dtype, size in zip(spec.shapes, spec.dtypes, sizes, strict=True):
        found.append(flat[:, first : first + size].view(dtype).unflatten(1, shape))
        first += size
    return found


def _is_channels_first() -> bool:
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

    return is_conv_state_dim_first()


MOVED = ("MAMBA2", "GDN_ATTN")
"""The kinds of states whose hand-over is tested with an engine."""
UNCACHED = {
    "MAMBA2": "vLLM's own kernel for Mamba 2 on CPUs does not return the states that vLLM's prefix cache needs",
}
"""The kinds of states that are refused on CPUs beside a prefix cache, and the reasons.

With a prefix cache, vLLM 0.32 expects that the kernel of Mamba 2 also returns the state at the last block's end. The
CPU's kernel returns only the last state. Then the engine ends with an `IndexError`, or keeps the state of another
position.
"""
