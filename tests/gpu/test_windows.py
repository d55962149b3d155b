"""Tests sliding windows in all layers: only the tokens inside the window are moved.

Two engines run on two GPUs, or both on one. `PD_GPU_TESTS_ON_CPU=1` runs the tests with engines on the CPU, where texts
are not compared.
"""

from __future__ import annotations

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

# Shorter and longer than the window of 384 tokens, and on both sides of its end.
LENGTHS = (2, 383, 384, 385, 386, 700) if ON_CPU else (2, 255, 383, 384, 385, 386, 700, 1100, 2500)
AT_ONCE = (40, 390, 777) if ON_CPU else (3, 300, 400, 512, 1024, 1500, 2049, 2500)
FOLDER = ROOT / "target" / "gpu-windows"
CHUNKS = 48


@pytest.fixture(scope="module")
def stacks() -> Iterator[tuple[Ours, Plain]]:
    keys = {"park_ms": 3000, "checksum": True}
    setting = small(FOLDER, (0, min(1, len(FOUND) - 1)), CHUNKS, "windows", sidecar_keys=keys)
    ours, plain = Ours(setting), Plain(setting)
    with serving(ours, plain):
        yield ours, plain


def test_only_the_window_was_moved_and_is_what_was_computed(stacks: tuple[Ours, Plain]) -> None:
    check_moved(stacks, LENGTHS, AT_ONCE, stacks[0].setting.kv.moved)
