"""Finds the states of recurrent layers in an engine's tensors.

A state is a few tensors of fixed size: the inputs of the convolution, and the sum that the layer carries on. The sum
has one shape everywhere. The inputs lie in the order (tokens, channels) or (channels, tokens), which vLLM chooses on
each side; they travel as (tokens, channels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pd_sidecar.kv.layout import LayoutError, _natural

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch


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

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """The dtype and the shape of each tensor, which must be equal on both sides."""
        return [(str(tensor.dtype), tuple(tensor.shape[1:])) for layer in self.layers for tensor in layer]


def states(tensors: Mapping[str, Sequence[torch.Tensor]], spec: Any) -> States:
    """Returns the states of one group's layers. Raises `LayoutError` for states of an unknown form."""
    if len(spec.shapes) > 2 or (len(spec.shapes) == 2 and len(spec.shapes[0]) != 2):
        raise LayoutError(f"the connector does not move states of the shapes {spec.shapes}")
    has_convolution = len(spec.shapes[0]) == 2
    names = sorted(tensors, key=_natural)
    layers = []
    for name in names:
        own = list(tensors[name])
        if [tuple(tensor.shape[1:]) for tensor in own] != [tuple(shape) for shape in spec.shapes]:
            raise LayoutError(f"{name}: states of {[tuple(t.shape) for t in own]} do not fit {spec.shapes}")
        if any(tensor.device.type != "cpu" for tensor in own):
            raise LayoutError(f"{name}: this version moves states in host memory only, not on {own[0].device}")
        if has_convolution and _is_channels_first():
            own[0] = own[0].transpose(1, 2)
        layers.append(tuple(own))
    return States(tuple(layers), tuple(names))


def _is_channels_first() -> bool:
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

    return is_conv_state_dim_first()
