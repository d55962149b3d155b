"""Formats that tensors of bytes do not tell apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pd_sidecar.layout import LayoutError
from pd_sidecar.quantization import quantization


def layer(k=1.0, v=1.0):
    return SimpleNamespace(_k_scale=torch.tensor(k), _v_scale=torch.tensor(v))


def of(*layers, cache_dtype="fp8_e4m3"):
    return quantization(cache_dtype, layers, calculated=False)


def test_formats_are_told_apart_and_their_second_names_are_not():
    assert of(layer(), layer()) == "fp8_e4m3, scales 1"
    assert of(layer(), layer(), cache_dtype="fp8") == "fp8_e4m3, scales 1"
    assert of(layer(), layer(), cache_dtype="fp8_e5m2") == "fp8_e5m2, scales 1"
    # Scales stand beside the elements.
    assert of(SimpleNamespace(), None, cache_dtype="fp8_ds_mla") == "fp8_ds_mla"


def test_scales_are_told_apart_by_layer_and_by_k_and_v():
    names = [
        of(layer(0.5, 0.5)),
        of(layer(0.5, 0.25)),
        of(layer(0.25, 0.5)),
        of(layer(0.5, 0.25), layer()),
        of(layer(), layer(0.5, 0.25)),
    ]
    assert len(set(names)) == len(names), names
    assert names[0] == "fp8_e4m3, scales 0.5"
    assert of(layer(0.5, 0.25)) == names[1]


def test_scales_that_each_engine_measures_are_refused():
    with pytest.raises(LayoutError, match="--calculate-kv-scales"):
        quantization("fp8", [layer()], calculated=True)
