"""Tests that this project computes the same chunk keys as LMCache, and knows all of LMCache's configuration keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from harness.drop_in.forked import LMCACHE_PYTHON
from harness.sidecar import BINARIES, ROOT

HARNESS = ROOT / "tests" / "harness" / "drop_in"
TOKENS = [*range(600), 7, 7, 7]
ALGORITHMS = ("sha256_cbor", "sha256", "builtin")
OURS = """
import json, sys
from pd_sidecar.kv.keys import ChunkHasher, keys
asked = json.loads(sys.argv[1])
print(json.dumps({
    a: keys(asked["model"], asked["world_size"], asked["rank"], ChunkHasher(a, 256).chain(asked["tokens"]), "bfloat16")
    for a in asked["algorithms"]
}))
"""


def _environment(seed: str | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    return kept | ({} if seed is None else {"PYTHONHASHSEED": seed}) | {"PYTHONPATH": str(ROOT / "python")}


def _run(command: list[str | Path], seed: str | None) -> Any:
    run = subprocess.run(command, env=_environment(seed), capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@cache
def lmcache(seed: str | None, algorithms: tuple[str, ...]) -> Any:
    asked = {"algorithms": algorithms, "tokens": TOKENS, "model": "org/model", "world_size": 2, "rank": 1}
    return _run(
        [LMCACHE_PYTHON, ROOT / "tests" / "harness" / "drop_in" / "keys_of_lmcache.py", json.dumps(asked)], seed
    )


@pytest.mark.parametrize(("seed", "algorithms"), [("0", ALGORITHMS), (None, ALGORITHMS[:2])])
def test_keys_are_lmcaches(seed: str | None, algorithms: tuple[str, ...]) -> None:
    asked = {"algorithms": algorithms, "tokens": TOKENS, "model": "org/model", "world_size": 2, "rank": 1}
    ours = _run([sys.executable, "-c", OURS, json.dumps(asked)], seed)
    assert ours == lmcache(seed, algorithms)["keys"]
    assert all(len(keys) == 3 for keys in ours.values())


def test_builtin_without_a_seed_is_refused_with_the_reason() -> None:
    asked = {"algorithms": ["builtin"], "tokens": TOKENS, "model": "m", "world_size": 1, "rank": 0}
    command = [sys.executable, "-c", OURS, json.dumps(asked)]
    run = subprocess.run(command, env=_environment(None), capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode != 0
    assert "needs PYTHONHASHSEED" in run.stderr


def test_every_key_of_lmcaches_configuration_is_known(tmp_path: Path) -> None:
    known = lmcache("0", ALGORITHMS)
    needed = {"pd_role": "sender", "pd_buffer_size": 1 << 20}
    # The sidecar reports unknown keys of the file and of the environment. In this test it must report none.
    file = tmp_path / "all.yaml"
    names = dict.fromkeys([*known["config"], *known["aliases"]], "unlikely")
    file.write_text(json.dumps(names | needed))
    checked = _check(file, {})
    assert "Unknown" not in checked, checked[checked.index("Unknown") :][:300]
    file.write_text(json.dumps(needed))
    variables = {f"LMCACHE_{name.upper()}": "unlikely" for name in known["config"]}
    assert "no such key" not in _check(file, variables)


def _check(file: Path, variables: dict[str, str]) -> str:
    command: list[str | Path] = [BINARIES / "sidecar", "check-config", file]
    environment = _environment(None) | variables
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    # Most values are wrong, so the exit code may be 64. The report then lists every mistake.
    assert run.returncode in (0, 64), run.stderr
    return str(run.stdout) + str(run.stderr)
