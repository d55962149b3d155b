"""What the elements of a quantised KV cache stand for.

vLLM keeps all its eight-bit formats in tensors of bytes: two engines may agree in every size and
still read each other's KV as other numbers.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

import torch

from .layout import LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterable

ALIASES = {"fp8": "fp8_e4m3"}
"""Of `--kv-cache-dtype`."""


def quantization(cache_dtype: str, layers: Iterable[object], *, calculated: bool) -> str:
    """A name of the format, equal where KV means the same: `fp8_e4m3, scales 1`.

    `cache_dtype` is vLLM's `--kv-cache-dtype`, `layers` are its attention layers in order, with
    the scales that KV is divided by before it is stored. With `calculated` scales, measured by each
    engine on the first prompt it sees, no two caches are alike: `LayoutError`.
    """
    if calculated:
        raise LayoutError(
            "--calculate-kv-scales gives each engine scales of its own, and KV of one is wrong in "
            "another; leave it out: scales then come from the checkpoint, or are 1"
        )
    scales = [number for layer in layers for number in _scales(layer)]
    name = ALIASES.get(cache_dtype, cache_dtype)
    if not scales:
        return name
    if len(set(scales)) == 1:
        return f"{name}, scales {scales[0]:g}"
    digest = hashlib.sha256(struct.pack(f"<{len(scales)}f", *scales)).hexdigest()
    return f"{name}, scales sha256 {digest[:16]}"


def _scales(layer: object) -> list[float]:
    """Those of K, then those of V."""
    scales = (getattr(layer, name, None) for name in ("_k_scale", "_v_scale"))
    return [
        number
        for scale in scales
        if isinstance(scale, torch.Tensor)
        for number in scale.detach().float().flatten().tolist()
    ]
