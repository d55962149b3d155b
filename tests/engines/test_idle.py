"""Measures the CPU use of the parts while there are no requests."""

from __future__ import annotations

import time

import pytest
from harness.pair import Pair
from harness.prompts import prompt
from harness.reference import Reference

SECONDS = 10.0
# On an otherwise idle machine a sidecar uses 0.002 cores. A process that polls without a pause uses a whole core.
MOST_CORES = 0.05


@pytest.mark.parametrize("transport", ["nixl", "tcp"])
def test_idle_sidecars(pair: Pair, reference: Reference, transport: str) -> None:
    pair.restart_sidecars(transport=transport)
    tokens = prompt(300, seed=61)
    # Move one request first, so that there is a link: a faulty NIXL endpoint would poll from this moment on.
    pair.move(tokens).check(reference.token_ids(tokens), len(tokens))
    pair.wait_empty()
    processes = {part.name: part.process for part in (pair.sender, pair.receiver)}
    before = {name: process.cpu_seconds() for name, process in processes.items() if process}
    time.sleep(SECONDS)
    cores = {name: (process.cpu_seconds() - before[name]) / SECONDS for name, process in processes.items() if process}
    assert all(used < MOST_CORES for used in cores.values()), cores
