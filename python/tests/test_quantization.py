"""Tests the number formats of KV in byte tensors. The tensor's dtype is the same for all these formats."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from pd_sidecar.kv.layout import Geometry
from pd_sidecar.kv.quantization import Quantization


def layer(k=1.0, v=1.0, **more):
    return SimpleNamespace(_k_scale=torch.tensor(k), _v_scale=torch.tensor(v), **more)


def of(*layers, cache_dtype="fp8_e4m3"):
    return str(Quantization.of(layers, cache_dtype))


def test_formats_are_told_apart_and_their_second_names_are_not():
    assert of(layer(), layer()) == "fp8_e4m3, scales 1"
    assert of(layer(), layer(), cache_dtype="fp8") == "fp8_e4m3, scales 1"
    assert of(layer(), layer(), cache_dtype="fp8_e5m2") == "fp8_e5m2, scales 1"
    # A layer may have another format than the engine's setting.
    assert of(layer(kv_cache_dtype="fp8"), cache_dtype="auto") == "fp8_e4m3, scales 1"
    # In this format the scales are stored next to the elements.
    assert of(SimpleNamespace(), None, cache_dtype="fp8_ds_mla") == "fp8_ds_mla"


def test_formats_and_scales_are_told_apart_by_layer_and_by_k_and_v():
    other = layer(kv_cache_dtype="fp8_e5m2")
    names = [
        of(layer(0.5, 0.5)),
        of(layer(0.5, 0.25)),
        of(layer(0.25, 0.5)),
        of(layer(0.5, 0.25), layer()),
        of(layer(), layer(0.5, 0.25)),
        of(layer(), other),
        of(other, layer()),
    ]
    assert len(set(names)) == len(names), names
    assert names[0] == "fp8_e4m3, scales 0.5"
    assert names[1].startswith("fp8_e4m3, scales by layer")
    assert names[5].startswith("fp8_e4m3 and fp8_e5m2")
    assert of(layer(0.5, 0.25)) == names[1]


def test_a_part_of_the_heads_has_their_scales():
    whole = Quantization.of([layer([0.5, 0.25, 1.0, 2.0], 3.0)], "fp8")
    half = Quantization.of([layer([1.0, 2.0], 3.0)], "fp8")
    assert whole.of_heads(range(2, 4)) == half
    assert Geometry((), 16, quantization=whole).of_heads(range(2, 4)).quantization == half
    assert str(whole.of_heads(range(2, 4))) == str(half) != str(whole.of_heads(range(2)))
    assert whole.is_scaled
    assert not Quantization.of([layer(), None], "fp8").is_scaled
