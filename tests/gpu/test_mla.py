"""Tests multi-head latent attention, which keeps one latent vector per token and layer, without heads and without V.

Two engines with the attention of DeepSeek-V2-Lite run on two GPUs, or both on one. `PD_GPU_TESTS_ON_CPU=1` runs the
tests with engines on the CPU, where texts are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from harness.sidecar import ROOT

from gpu.moved import check_moved
from gpu.setting import ON_CPU, gpus
from gpu.small import serving, small
from gpu.stacks import Ours, Plain

FOUND = gpus()
if not FOUND and not ON_CPU:
    pytest.skip("NOT TESTED: there is no GPU", allow_module_level=True)

LENGTHS = (1, 257, 700) if ON_CPU else (1, 255, 257, 1100, 2500)
AT_ONCE = (40, 300, 777) if ON_CPU else (1, 300, 512, 700, 1024, 1500, 2049, 2500)
# The latent vector has 512 numbers per token and layer; the part that carries the position has 64.
LATENT = 512 + 64
FOLDER = ROOT / "target" / "gpu-mla"
CHUNKS = 48


@pytest.fixture(scope="module")
def stacks() -> Iterator[tuple[Ours, Plain]]:
    keys = {"park_ms": 3000, "checksum": True}
    setting = small(FOLDER, (0, min(1, len(FOUND) - 1)), CHUNKS, "mla", sidecar_keys=keys)
    ours, plain = Ours(setting), Plain(setting)
    with serving(ours, plain):
        yield ours, plain


def test_all_of_the_latent_was_moved_and_is_what_was_computed(stacks: tuple[Ours, Plain]) -> None:
    layers = json.loads((stacks[0].setting.model / "config.json").read_text())["num_hidden_layers"]
    token_bytes = layers * LATENT * (4 if ON_CPU else 2)
    check_moved(stacks, LENGTHS, AT_ONCE, lambda length: length * token_bytes)
