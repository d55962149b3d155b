"""Describes the number format of a quantised KV cache.

vLLM keeps nearly all its eight-bit formats in tensors of bytes. So two engines may agree in every size and still read
different numbers from each other's KV.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

ALIASES = {"fp8": "fp8_e4m3"}
"""Other names of formats in `--kv-cache-dtype`."""


@dataclass(frozen=True)
class Quantization:
    """The format of each layer, and the scales by which its K and V were divided.

    A layer has one scale for all heads, or one per head.
    """

    layers: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...]

    @classmethod
    def of(cls, layers: Iterable[object], cache_dtype: str) -> Quantization:
        """Reads the formats of vLLM's attention layers. A layer that names no format has `cache_dtype`."""
        found = []
        for layer in layers:
            name = getattr(layer, "kv_cache_dtype", None) or cache_dtype
            scales = (_scales(layer, "_k_scale"), _scales(layer, "_v_scale"))
            found.append((ALIASES.get(name, name), *scales))
        return cls(tuple(found))

    def of_heads(self, heads: range) -> Quantization:
        """Returns the same formats with only these heads' scales."""

        def cut(scales: tuple[float, ...]) -> tuple[float, ...]:
            return scales if len(scales) == 1 else scales[heads.start : heads.stop]

        return Quantization(tuple((name, cut(k), cut(v)) for name, k, v in self.layers))

    @property
    def is_scaled(self) -> bool:
        """True if a scale differs from 1."""
        return not self._all_scales() <= {1.0}

    def __str__(self) -> str:
        """Returns a text such as `fp8_e4m3, scales 1`. Two caches have the same text if and only if their bytes have
        the same meaning.
        """
        formats = sorted({name for name, _, _ in self.layers})
        scales = sorted(self._all_scales())
        name = " and ".join(formats)
        if len(formats) > 1 or len(scales) > 1:
            digest = hashlib.sha256(repr(self.layers).encode()).hexdigest()
            return f"{name}, scales by layer, sha256 {digest[:16]}"
        return f"{name}, scales {scales[0]:g}" if scales else name

    def _all_scales(self) -> set[float]:
        return {scale for _, k, v in self.layers for scale in (*k, *v)}


def _scales(layer: object, name: str) -> tuple[float, ...]:
    scale = getattr(layer, name, None)
    if not isinstance(scale, torch.Tensor):
        return ()
    return tuple(scale.detach().float().flatten().tolist())
