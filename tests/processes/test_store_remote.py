"""Runs the store above real distributed stores: Redis, a cluster of Redis servers, and an S3 server.

Each test compares the bytes and checks the counters, because a store that answers from its own memory would give the
same bytes.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.redis import ask
from harness.remote_stores import RedisCluster, RedisServer, RemoteStore, S3Server
from harness.sidecar import BINARIES
from harness.store import Store
from harness.waiting import until

from pd_sidecar.store.client import Bounds, StoreClient

KIB = 1 << 10
MIB = 1 << 20
VALUE = 100 * KIB
FLAGS = ("--memory", "64MiB", "--max-value", "1MiB", "--grace", "2s")


def _redis(folder: Path, logs: Path) -> RemoteStore:
    return RedisServer(folder, logs)


def _cluster(folder: Path, logs: Path) -> RemoteStore:
    return RedisCluster(folder, logs)


def _s3(folder: Path, logs: Path) -> RemoteStore:
    return S3Server(logs)


REMOTES = {"redis": _redis, "cluster": _cluster, "s3": _s3}


@pytest.fixture(scope="module", params=REMOTES)
def remote(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, logs: Path
) -> Iterator[RemoteStore]:
    remote = REMOTES[request.param](tmp_path_factory.mktemp("remote"), logs)
    remote.start()
    yield remote
    remote.stop()


@contextmanager
def store_above(
    remote: RemoteStore, logs: Path, *more: str | Path, queue: str = "64MiB", timeout: str = "10s"
) -> Iterator[tuple[Store, StoreClient]]:
    """Runs a store that has nothing in memory, with S3 credentials that an open server does not check."""
    os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
    bounds = ("--remote-queue", queue, "--remote-timeout", timeout)
    store = Store(logs, *FLAGS, *bounds, *remote.flags, *more)
    store.start()
    client = StoreClient(f"lm://127.0.0.1:{store.port}", Bounds(timeout_s=30.0))
    try:
        yield store, client
    finally:
        client.close()
        store.stop()


def values_of(name: str, count: int, size: int = VALUE) -> dict[bytes, bytes]:
    """Returns values whose keys no other test uses."""
    return {f"{name}@{at}".encode(): random.Random(f"{name}{at}").randbytes(size) for at in range(count)}


def put(client: StoreClient, values: dict[bytes, bytes]) -> None:
    client.put([(key, memoryview(value)) for key, value in values.items()])


def get(client: StoreClient, values: dict[bytes, bytes]) -> list[bool]:
    """Returns for each value whether it came. Fails if another value came."""
    memory = {key: bytearray(len(value)) for key, value in values.items()}
    found = client.get([(key, memoryview(part)) for key, part in memory.items()])
    for (key, value), there in zip(values.items(), found, strict=True):
        assert not there or memory[key] == value, f"{key!r}: wrong bytes"
    return found


def outcome(store: Store, operation: str, name: str) -> float:
    return store.metrics().sum("pd_store_remote_requests", operation=operation, outcome=name)


def away(store: Store, operation: str) -> bool:
    return store.metrics().sum("pd_store_remote_away", operation=operation) == 1


def wait_stored(store: Store, count: int) -> None:
    until("the values are not put", lambda: outcome(store, "put", "stored") >= count)
    until("values still wait", lambda: store.metrics().sum("pd_store_remote_waiting_bytes") == 0)


def test_what_one_store_puts_another_store_serves(remote: RemoteStore, logs: Path) -> None:
    values = values_of("shared", 100)
    with store_above(remote, logs) as (store, client):
        put(client, values)
        wait_stored(store, len(values))
        assert store.metrics().sum("pd_store_remote_put_bytes") == 100 * VALUE
        # Memory has them all, so nothing is read from the remote store.
        assert all(get(client, values))
        assert store.metrics().sum("pd_store_remote_get_bytes") == 0
        store.kill()
    with store_above(remote, logs) as (store, client):
        assert client.exists([*values, b"never"]) == [True] * 100 + [False]
        metrics = store.metrics()
        assert metrics.sum("pd_store_requests", operation="exist", outcome="hit_on_remote") == 100
        assert metrics.sum("pd_store_remote_get_bytes") == 100 * VALUE
        # A look-up that finds a value has brought it into memory.
        assert all(get(client, values))
        metrics = store.metrics()
        assert metrics.sum("pd_store_requests", operation="get", outcome="hit") == 100
        assert metrics.sum("pd_store_remote_get_bytes") == 100 * VALUE


def test_a_damaged_value_is_missing_and_can_be_put_again(remote: RemoteStore, logs: Path) -> None:
    values = values_of("damaged", 5)
    names: dict[bytes, str] = {}
    with store_above(remote, logs, "--remote-prefix", "torn") as (store, client):
        for at, (key, value) in enumerate(values.items(), start=1):
            before = set(remote.names())
            put(client, {key: value})
            wait_stored(store, at)
            (names[key],) = set(remote.names()) - before
    changed, cut, empty, foreign, whole = values
    text = bytearray(remote.read(names[changed]))
    text[-VALUE // 2] ^= 1
    remote.write(names[changed], bytes(text))
    remote.write(names[cut], remote.read(names[cut])[: VALUE // 2])
    remote.write(names[empty], b"x")
    remote.write(names[foreign], remote.read(names[whole]))
    with store_above(remote, logs, "--remote-prefix", "torn") as (store, client):
        assert client.exists(list(values)) == [False] * 4 + [True]
        assert get(client, values) == [False] * 4 + [True]
        assert outcome(store, "get", "broken") == 8
        put(client, values)
        wait_stored(store, 5)
    with store_above(remote, logs, "--remote-prefix", "torn") as (_, client):
        assert all(get(client, values))


@pytest.mark.parametrize("ending", [signal.SIGSTOP, signal.SIGKILL])
def test_a_remote_store_that_hangs_or_dies_costs_only_its_values(
    remote: RemoteStore, logs: Path, ending: signal.Signals
) -> None:
    near = values_of(f"near-{ending.name}", 20)
    with store_above(remote, logs, queue="4MiB", timeout="0.5s") as (store, client):
        put(client, near)
        wait_stored(store, len(near))
        if ending == signal.SIGSTOP:
            remote.signal(signal.SIGSTOP)
        else:
            remote.stop()
        try:
            # Values in memory are served while look-ups wait for the remote store.
            absent = [f"absent-{ending.name}@{at}".encode() for at in range(200)]
            found: list[bool] = []
            asking = threading.Thread(target=lambda: found.extend(client.exists(absent)))
            asking.start()
            rounds = 0
            while asking.is_alive():
                assert all(get(client, near))
                rounds += 1
            asking.join()
            assert found == [False] * 200
            assert rounds or ending == signal.SIGKILL
            # Enough failures begin a pause, in which the remote store is not asked.
            until("reads do not pause", lambda: client.exists(absent[:4]) and away(store, "get"))
            assert outcome(store, "get", "timeout") + outcome(store, "get", "failed") >= 3
            # More than may wait is dropped. All is in memory.
            late = values_of(f"late-{ending.name}", 20, MIB // 2)
            put(client, late)
            assert all(get(client, late))
            until("no value was dropped", lambda: outcome(store, "put", "full") >= 8)
            assert 0 < store.metrics().sum("pd_store_remote_waiting_bytes") <= 4 * MIB
        finally:
            if ending == signal.SIGSTOP:
                remote.signal(signal.SIGCONT)
            else:
                remote.start()
        stored = outcome(store, "put", "stored")
        until(
            "the remote store stays away",
            lambda: client.exists(absent[:1]) and store.metrics().sum("pd_store_remote_away") == 0,
        )
        until("no value is put again", lambda: outcome(store, "put", "stored") > stored)
        last = values_of(f"last-{ending.name}", 5)
        stored = outcome(store, "put", "stored")
        put(client, last)
        wait_stored(store, int(stored) + 5)
    with store_above(remote, logs) as (_, client):
        assert all(get(client, last))


def test_a_full_redis_still_serves(tmp_path: Path, logs: Path) -> None:
    remote = RedisServer(tmp_path, logs, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    remote.start()
    try:
        values = values_of("full", 60)
        with store_above(remote, logs) as (store, client):
            put(client, values)
            until("puts do not pause", lambda: away(store, "put"))
            stored = outcome(store, "put", "stored")
            assert 5 < stored < 40
            assert all(get(client, values))
            store.kill()
        with store_above(remote, logs) as (store, client):
            found = get(client, values)
            assert sum(found) >= stored
            assert store.metrics().sum("pd_store_remote_away") == 0
    finally:
        remote.stop()


def test_a_value_ends_in_the_remote_store(remote: RemoteStore, logs: Path) -> None:
    values = values_of("ending", 1)
    with store_above(remote, logs, "--ttl", "2s", "--remote-prefix", "ending") as (store, client):
        put(client, values)
        wait_stored(store, 1)
        if isinstance(remote, RedisServer):
            (name,) = (name for name in remote.names() if name.startswith("ending/"))
            left = ask(remote.port, b"PTTL", name.encode())
            assert isinstance(left, int)
            assert 0 < left <= 2000
        store.kill()
    with store_above(remote, logs, "--remote-prefix", "ending") as (store, client):
        # A value that was read while it lived ends in memory, too.
        until("the values stay", lambda: client.exists(list(values)) == [False])
        assert get(client, values) == [False]
        metrics = store.metrics()
        ended = metrics.sum("pd_store_requests", outcome="expired") + outcome(store, "get", "expired")
        assert ended >= 1 or outcome(store, "get", "miss") >= 1


def check_config(flags: list[str | Path], env: dict[str, str] | None = None) -> tuple[int, str]:
    run = subprocess.run(
        [BINARIES / "pd-store", "--check-config", *FLAGS, *flags],
        check=False, capture_output=True, text=True, timeout=60, env={**os.environ, **(env or {})},
    )  # fmt: skip
    return run.returncode, run.stdout + run.stderr


def credentials(folder: Path, **values: str) -> list[str | Path]:
    path = folder / "credentials"
    path.write_text("".join(f"{name} = {value}\n" for name, value in values.items()))
    path.chmod(0o600)
    return ["--remote-credentials", path]


def test_credentials_are_used_and_never_shown(tmp_path: Path, logs: Path) -> None:
    remote = RedisServer(tmp_path, logs, "--requirepass", "hunter2-right")
    remote.start()
    try:
        code, text = check_config([*remote.flags, *credentials(tmp_path, password="hunter2-right")])
        assert (code, "a value was written and read" in text) == (0, True), text
        wrong = [*remote.flags, *credentials(tmp_path, password="hunter2-wrong")]
        code, text = check_config(wrong)
        assert (code, "hunter2" in text) == (69, False), text
        assert "--remote redis://" in text, text
        assert check_config(remote.flags)[0] == 69
        # A store with a wrong password serves from memory.
        values = values_of("wrong password", 5)
        with store_above(remote, logs, *wrong[2:]) as (store, client):
            put(client, values)
            until("puts do not pause", lambda: away(store, "put"))
            assert all(get(client, values))
            assert store.process is not None
            assert "hunter2" not in store.process.output()
            assert "the store goes on without it" in store.process.output()
    finally:
        remote.stop()


def test_an_s3_server_checks_the_signature(tmp_path: Path, logs: Path) -> None:
    remote = S3Server(logs, closed=True)
    remote.start()
    try:
        key, secret = remote.make_key()
        own = {"aws_access_key_id": key, "aws_secret_access_key": secret}
        code, text = check_config([*remote.flags, *credentials(tmp_path, **own)])
        assert code == 0, text
        own["aws_secret_access_key"] = "no-such-secret"
        code, text = check_config([*remote.flags, *credentials(tmp_path, **own)])
        assert code == 69, text
        assert key not in text
        assert "no-such-secret" not in text
        # Amazon's variables serve as well.
        env = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
        assert check_config(remote.flags, env)[0] == 0
    finally:
        remote.stop()


def test_a_remote_store_that_is_away_does_not_stop_the_start(tmp_path: Path, logs: Path) -> None:
    remote = RedisServer(tmp_path, logs)
    began = time.monotonic()
    code, text = check_config(remote.flags)
    assert code == 69, text
    assert time.monotonic() - began < 30
    values = values_of("away", 3)
    with store_above(remote, logs) as (store, client):
        put(client, values)
        assert all(get(client, values))
        remote.start()
        try:
            wait_stored(store, 3)
            assert len(remote.names()) == 3
        finally:
            remote.stop()
