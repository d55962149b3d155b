"""Puts KV of one engine into a store, and loads it for another, through the tier of vLLM's OffloadingConnector.

The tier's half of vLLM (the specification, the jobs, the look-ups, host memory) and the store are real. No engine runs.
`tests/engines/test_store.py` has the same with engines.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.store import Store
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from pd_sidecar.store.tier import COMPUTE_S, DECLINED, LOAD_S, StoreTier
from pd_sidecar.store.worth import Worth

CHUNK = 1 << 16
CHUNKS = 200
BOUND_S = 60.0
TIMEOUT_S = 20.0
# The engine computes a chunk in this time. A slow store needs longer for a chunk, by this delay.
COMPUTE_TIME_S, DELAY_S = 0.2, 0.8


def spec(name: str = "m", dtype: str = "bfloat16", layers: int = 2) -> TieringOffloadingSpec:
    parallel = OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, is_parallelism_agnostic=True)
    config = OffloadingConfig(
        groups=(OffloadingGroupConfig(16, tuple(f"layers.{at}" for at in range(layers)), 0),),
        worker_kv_bytes_per_block=CHUNK,
        enable_kv_cache_events=False,
        extra_config={"cpu_bytes_to_use": CHUNK * CHUNKS},
        engine_id=f"store-{os.getpid()}",
        model=OffloadingModelConfig(name, dtype),
        cache=OffloadingCacheConfig(16, 1),
        parallel=parallel,
        kv_cache_layout="NHD",
    )
    return TieringOffloadingSpec(config)


class SlowWire:
    """A TCP relay in front of a store, which can delay what the store sends."""

    def __init__(self, store: Store) -> None:
        self.delay_s = 0.0
        relay = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", store.port)) as to:
                    back = threading.Thread(target=relay.forward, args=(to, self.request, True))
                    back.start()
                    relay.forward(self.request, to, False)
                    back.join()

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def forward(self, source: socket.socket, sink: socket.socket, delayed: bool) -> None:
        while data := source.recv(CHUNK):
            time.sleep(self.delay_s if delayed else 0.0)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Side:
    """The host memory of one engine, with the tier."""

    ids = itertools.count()

    def __init__(self, *stores: Store | SlowWire, of: TieringOffloadingSpec | None = None, **options: Any) -> None:
        self.memory: Any = np.zeros((CHUNKS, CHUNK), dtype=np.int8)
        urls = [f"lm://127.0.0.1:{store.port}" for store in stores]
        self.tier = StoreTier(of or spec(), self.memory.data, "StoreTier", urls, **{"timeout_s": TIMEOUT_S, **options})

    def store(self, chunks: range, request: str = "put") -> JobResult:
        job = TransferJob(next(self.ids), keys(chunks), np.array(chunks), False, ReqContext(request))
        self.tier.submit_store(job)
        return self.end_of(job)

    def load(self, chunks: range) -> JobResult:
        job = TransferJob(next(self.ids), keys(chunks), np.array(chunks), True, ReqContext("get"))
        self.tier.submit_load(job)
        return self.end_of(job)

    def end_of(self, job: TransferJob) -> JobResult:
        deadline = time.monotonic() + BOUND_S
        while not (ended := list(self.tier.get_finished_jobs())):
            assert time.monotonic() < deadline, "the job does not end"
            time.sleep(0.005)
        (result,) = ended
        assert result.job_id == job.job_id
        return result

    def lookup(self, chunks: range, request: str) -> list[bool]:
        """Asks as vLLM's scheduler does: at each step, until there is an answer for each chunk."""
        context = ReqContext(request)
        deadline = time.monotonic() + BOUND_S
        while True:
            answers = [self.tier.lookup(key, context) for key in keys(chunks)]
            self.tier.on_schedule_end(ScheduleEndContext([], []))
            if LookupResult.RETRY not in answers:
                self.tier.on_request_finished(context)
                return [answer is LookupResult.HIT for answer in answers]
            assert time.monotonic() < deadline, "the look-up does not end"
            time.sleep(0.005)


def keys(chunks: range) -> list[Any]:
    return [make_offload_key(chunk.to_bytes(32, "big"), 0) for chunk in chunks]


@pytest.fixture
def store(logs: Path, tmp_path: Path) -> Iterator[Store]:
    store = Store(logs, "--memory", "256MiB", "--disk", tmp_path / "store", "--disk-size", "1GiB")
    store.start()
    yield store
    store.stop()


@pytest.fixture
def sides(store: Store) -> Iterator[tuple[Side, Side]]:
    one, other = Side(store), Side(store)
    one.memory[:] = np.random.default_rng(1).integers(-128, 127, one.memory.shape, dtype=np.int8)
    yield one, other
    for side in (one, other):
        side.tier.shutdown()


def test_what_one_engine_puts_another_loads(store: Store, sides: tuple[Side, Side]) -> None:
    one, other = sides
    # More chunks than are on their way at the same time.
    put = one.store(range(150))
    assert put == JobResult(put.job_id, True, None, put.transfer_time, 150 * CHUNK)
    assert other.lookup(range(150), "a") == [True] * 150
    assert other.lookup(range(148, 152), "b") == [True, True, False, False]
    got = other.load(range(150))
    assert got.success and got.transfer_bytes == 150 * CHUNK
    assert np.array_equal(other.memory[:150], one.memory[:150])
    assert not other.memory[150:].any()
    # Chunks that the store has are not put again.
    assert one.store(range(100, 160)).transfer_bytes == 10 * CHUNK
    assert store.metrics().sum("pd_store_put_bytes") == 160 * CHUNK


@pytest.mark.parametrize("other", [{"name": "other"}, {"dtype": "fp8"}, {"layers": 3}, {"namespace": "v2"}], ids=str)
def test_kv_of_another_model_is_not_found(store: Store, sides: tuple[Side, Side], other: dict[str, Any]) -> None:
    sides[0].store(range(4))
    stranger = Side(store, **other) if "namespace" in other else Side(store, of=spec(**other))
    try:
        assert stranger.lookup(range(4), "a") == [False] * 4
    finally:
        stranger.tier.shutdown()
    assert sides[1].lookup(range(4), "a") == [True] * 4


def test_chunks_that_left_the_store(store: Store, sides: tuple[Side, Side]) -> None:
    """Between the look-up and the load a chunk may be evicted. The chunks before it stay useful."""
    one, other = sides
    one.store(range(3))
    got = other.load(range(6))
    assert not got.success and list(got.successful_keys or ()) == keys(range(3))
    assert np.array_equal(other.memory[:3], one.memory[:3])
    assert not other.memory[3:].any()


def test_a_store_that_ends_and_comes_back(store: Store, sides: tuple[Side, Side]) -> None:
    one, other = sides
    one.store(range(8))
    assert other.lookup(range(8), "a") == [True] * 8
    assert store.process is not None
    store.process.signal(signal.SIGKILL)
    store.stop()
    assert not other.load(range(8)).success
    assert not one.store(range(8, 16)).success
    assert other.lookup(range(8), "b") == [False] * 8
    store.start()
    # Calls fail at once for a moment after a failure. Chunks that reached the disk before the kill are there again.
    deadline = time.monotonic() + BOUND_S
    while not (one.store(range(16)).success and other.load(range(16)).success):
        assert time.monotonic() < deadline, "the store does not come back"
        time.sleep(0.05)
    assert np.array_equal(other.memory[:16], one.memory[:16])


def test_a_store_that_hangs(store: Store, sides: tuple[Side, Side]) -> None:
    sides[0].store(range(8))
    other = Side(store, timeout_s=1.0)
    assert store.process is not None
    store.process.signal(signal.SIGSTOP)
    try:
        assert other.lookup(range(8), "a") == [False] * 8
        assert not other.load(range(8)).success
        assert not other.memory.any()
    finally:
        store.process.signal(signal.SIGCONT)
        other.tier.shutdown()


def test_kv_that_may_not_wait_is_not_put(store: Store) -> None:
    side = Side(store, pending_bytes=4 * CHUNK)
    try:
        assert not side.store(range(5)).success
        assert side.store(range(4)).success
        assert store.metrics().sum("pd_store_put_bytes") == 4 * CHUNK
    finally:
        side.tier.shutdown()


def test_several_stores_and_one_of_them_ends(store: Store, logs: Path) -> None:
    second = Store(logs, "--memory", "256MiB")
    second.start()
    # Each engine may name the stores in another order.
    one, other = Side(store, second), Side(second, store)
    try:
        one.memory[:] = np.random.default_rng(2).integers(-128, 127, one.memory.shape, dtype=np.int8)
        assert one.store(range(100)).success
        shares = [each.metrics().sum("pd_store_put_bytes") // CHUNK for each in (store, second)]
        assert sum(shares) == 100 and min(shares) > 25, shares
        assert other.lookup(range(100), "a") == [True] * 100
        assert other.load(range(100)).success
        assert np.array_equal(other.memory[:100], one.memory[:100])

        second.stop()
        found = other.lookup(range(100), "b")
        assert found.count(True) == shares[0]
        got = other.load(range(100))
        assert not got.success and len(got.successful_keys or ()) == shares[0]
    finally:
        for side in (one, other):
            side.tier.shutdown()
        second.stop()


def test_a_store_slower_than_the_engine_is_not_loaded_from(store: Store) -> None:
    wire = SlowWire(store)
    side = Side(wire, timeout_s=BOUND_S)
    # This store is not tried again, however long the test takes.
    side.tier._worth = Worth(retry_s=3600)
    try:
        for at in range(4):
            side.tier.on_schedule_end(ScheduleEndContext([f"put-{at}"], []))
            time.sleep(COMPUTE_TIME_S)
            assert side.store(range(at, at + 1), f"put-{at}").success
        assert side.load(range(4)).success
        assert side.lookup(range(4), "fast") == [True] * 4
        stats = side.tier.get_stats()
        assert stats is not None and DECLINED not in stats.reduce()

        wire.delay_s = DELAY_S
        # The median of the last loads decides.
        assert all(side.load(range(1)).success for _ in range(2))
        assert side.lookup(range(4), "slow") == [False] * 4
        stats = side.tier.get_stats()
        assert stats is not None
        told = stats.reduce()
        assert told[DECLINED] == 1 and told[LOAD_S] > told[COMPUTE_S] >= COMPUTE_TIME_S, told
    finally:
        wire.delay_s = 0.0
        side.tier.shutdown()
        wire.stop()
