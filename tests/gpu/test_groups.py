"""Tests models with several KV groups: windows beside full attention, and states beside full attention.

Two engines run on two GPUs, or both on one. `PD_GPU_TESTS_ON_CPU=1` runs the tests of the windows with engines on the
CPU, where texts are not compared.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from harness.sidecar import ROOT

from gpu.kills import check_killed
from gpu.model import SHAPES as MODELS
from gpu.moved import check_moved
from gpu.setting import ON_CPU, gpus
from gpu.small import serving, small
from gpu.stacks import Ours, Plain

FOUND = gpus()
if not FOUND and not ON_CPU:
    pytest.skip("NOT TESTED: there is no GPU", allow_module_level=True)

# Shorter and longer than the window of 128 tokens, on both sides of its end and of a block's end.
LENGTHS = (2, 127, 129, 130, 700) if ON_CPU else (2, 17, 127, 128, 129, 130, 145, 255, 257, 700, 1100, 2500)
AT_ONCE = (40, 390, 777) if ON_CPU else (3, 300, 400, 512, 1024, 1500, 2049, 2500)
CHUNKS = 160
FLAGS = ("--enforce-eager", "--max-num-seqs", "64")
# The other kernel for gated delta nets is compiled when it is first used, and needs NVIDIA's compiler.
# Newer versions of transformers change the names of the layers' types, and vLLM 0.24 does not know the new names.
NAMES = json.dumps({"layer_types": MODELS["mamba2"]["layer_types"]})
SHAPES = {
    "mixed": FLAGS,
    "delta-net": (*FLAGS, "--gdn-prefill-backend", "triton"),
    "mamba2": (*FLAGS, "--hf-overrides", NAMES),
}


@pytest.fixture(scope="module", params=["mixed"] if ON_CPU else list(SHAPES))
def stacks(request: pytest.FixtureRequest) -> Iterator[tuple[Ours, Plain]]:
    more = {} if ON_CPU else {"engine_flags": SHAPES[request.param], "kv_bytes": 2 << 30}
    keys = {"park_ms": 3000 if ON_CPU else 1000, "checksum": True}
    folder = ROOT / "target" / f"gpu-groups-{request.param}"
    setting = small(folder, (0, min(1, len(FOUND) - 1)), CHUNKS, request.param, sidecar_keys=keys, **more)
    ours, plain = Ours(setting), Plain(setting)
    with serving(ours, plain):
        yield ours, plain


def test_all_groups_were_moved_and_are_what_was_computed(stacks: tuple[Ours, Plain]) -> None:
    check_moved(stacks, LENGTHS, AT_ONCE, stacks[0].setting.kv.moved)


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_a_failed_load_of_several_groups_is_computed_again(stacks: tuple[Ours, Plain], victim: str) -> None:
    ours, plain = stacks
    check_killed(ours, plain, victim)
    deadline = time.monotonic() + 15
    for engine in ours.engines:
        assert engine.process is not None
        assert engine.process.alive
        while (held := (engine.requests(), engine.cache_usage())) != (0, 0.0):
            assert time.monotonic() < deadline, f"{engine.options.name}: {held}"
            time.sleep(0.05)
