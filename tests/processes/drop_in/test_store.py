"""Uses the store with LMCache's real client: every format and element type, many clients, large values, restarts."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.drop_in.forked import LMCACHE_PYTHON
from harness.sidecar import ROOT
from harness.store import Store

SCRIPT = ROOT / "tests" / "harness" / "drop_in" / "lm_client.py"
MIB = 1 << 20
ANSWER_BOUND_S = 240.0
BOUND_S = 60.0


class Lmcache:
    """One process with LMCache's client, which runs one command after the other."""

    def __init__(self, log: Path) -> None:
        with log.open("wb") as errors:
            self._child = subprocess.Popen(
                [LMCACHE_PYTHON, SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def __call__(self, store: Store, **command: Any) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps({"port": store.port, **command}) + "\n")
        self._child.stdin.flush()
        ready, _, _ = select.select([self._child.stdout], [], [], ANSWER_BOUND_S)
        assert ready, f"{command['do']}: no answer within {ANSWER_BOUND_S} s"
        answer = json.loads(self._child.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def stop(self) -> None:
        self._child.kill()
        self._child.communicate()


@pytest.fixture(scope="module")
def lmcache(logs: Path) -> Iterator[Lmcache]:
    client = Lmcache(logs / "lm-client.log")
    yield client
    client.stop()


@pytest.fixture
def store(logs: Path, tmp_path: Path) -> Iterator[Store]:
    store = Store(logs, "--memory", "256MiB", "--disk", tmp_path / "store", "--disk-size", "1GiB")
    store.start()
    yield store
    store.stop()


def test_every_format_and_type_comes_back(store: Store, lmcache: Lmcache) -> None:
    answer = lmcache(store, do="types")
    assert len(answer["types"]) >= 4 * 7
    hits = store.metrics().sum("pd_store_requests", operation="get", outcome="hit")
    assert hits == len(answer["types"])


def test_many_clients_with_the_largest_values(store: Store, lmcache: Lmcache) -> None:
    answer = lmcache(store, do="many", clients=16, values=3, bytes=4 * MIB)
    assert answer["wrong"] == []
    assert lmcache(store, do="many", clients=2, values=1, bytes=64 * MIB)["wrong"] == []
    metrics = store.metrics()
    assert metrics.sum("pd_store_put_bytes") == 16 * 3 * 4 * MIB + 2 * 64 * MIB
    # The store frees the room of an answer a moment after the client has read it.
    deadline = time.monotonic() + BOUND_S
    while store.metrics().sum("pd_store_in_flight_bytes"):
        assert time.monotonic() < deadline, "room for values in flight is lost"
        time.sleep(0.05)
    assert metrics.sum("pd_store_memory_bytes") <= 256 * MIB


def test_values_outlive_a_kill(store: Store, lmcache: Lmcache) -> None:
    keys = [f"k{i}" for i in range(20)]
    assert lmcache(store, do="put", keys=keys, bytes=MIB)["last"]
    deadline = time.monotonic() + BOUND_S
    # The disk also gets the cache's own tables, so the last value is there only when nothing more is written.
    written = 0.0
    while (now := store.metrics().sum("pd_store_disk_written_bytes")) < 20 * MIB or now != written:
        assert time.monotonic() < deadline, "the values did not reach the disk"
        written = now
        time.sleep(0.5)
    store.kill()
    store.start()
    assert lmcache(store, do="exist", keys=[*keys, "never"])["exist"] == [True] * 20 + [False]
    assert lmcache(store, do="get", keys=[*keys, "never"])["got"] == ["same"] * 20 + ["missing"]


def test_a_signal_ends_the_store_in_order(store: Store, lmcache: Lmcache) -> None:
    assert lmcache(store, do="put", keys=["k"], bytes=MIB)["last"]
    assert store.process is not None
    store.process.signal(signal.SIGTERM)
    assert store.process.wait(BOUND_S) == 0
    store.start()
    assert lmcache(store, do="get", keys=["k"])["got"] == ["same"]
