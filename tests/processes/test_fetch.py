"""Tests KV that a prefill engine keeps until a decode side fetches it. Two sidecars run as processes; no engine runs.

A client at each sidecar takes the place of an engine, and the test takes the place of the router.
"""

from __future__ import annotations

import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import zmq
from harness.client import call
from harness.ports import free_port
from harness.sidecar import BINARIES, CHUNK_TOKENS, NO_PUSH, Sidecar, SidecarOptions

from pd_sidecar.client import Client
from pd_sidecar.sidecar.wire import Ended, Granted, Hello, Keeper, Layout, Ready

LAYOUT = Layout("tiny", "bfloat16", 2, 2, 16, False, CHUNK_TOKENS)
TOKEN_BYTES = LAYOUT.chunk_bytes // CHUNK_TOKENS
TOKENS = CHUNK_TOKENS + 7
KEYS = ["tiny@1@0@a@bfloat16", "tiny@1@0@b@bfloat16"]
BOUND_S = 60.0

pytestmark = pytest.mark.skipif(NO_PUSH, reason="nothing can be pushed")


@dataclass
class Pair:
    """Two sidecars, and two clients that take the place of their engines."""

    sender: Sidecar
    receiver: Sidecar
    prefill: Client
    decode: Client
    requests: int = 0

    @property
    def port(self) -> Keeper:
        fetch = self.prefill.welcome.fetch
        assert fetch is not None, "the sender announces no fetch port"
        return fetch

    def keep(self, keep_ms: int = 60_000) -> tuple[str, str]:
        """Keeps the KV of a request. Returns the prefill side's id and the token."""
        self.requests += 1
        req, token = f"p-{self.requests}", secrets.token_hex(16)
        self.prefill.keep(req, token, KEYS, tokens=TOKENS, upto=TOKENS, keep_ms=keep_ms)
        return req, token

    def expect(self, token: str, *, epoch: int | None = None) -> str:
        """Announces a decode request. Returns its id."""
        self.requests += 1
        req = f"d-{self.requests}"
        epoch = self.prefill.welcome.epoch if epoch is None else epoch
        # With this `keep_ms` the receiver sends `Renew` once a second.
        self.decode.expect(req, token, self.port, epoch=epoch, keep_ms=3_000)
        return req

    def park(self, req: str, have: int = 0) -> None:
        self.decode.await_(req, KEYS, tokens=TOKENS, have_tokens=have, deadline_ms=30_000)

    def ends(self, *reqs: str) -> dict[str, str | None]:
        """Plays both engines until these requests have ended. Returns the reasons; `None` means success."""
        ends: dict[str, str | None] = {}
        deadline = time.monotonic() + BOUND_S
        while not ends.keys() >= set(reqs):
            assert time.monotonic() < deadline, f"only {ends} of {reqs} ended"
            for message in self.prefill.wait(0.02):
                if isinstance(message, Granted):
                    for chunk, slot in zip(message.chunks, message.slots, strict=True):
                        self.prefill.slot(slot)[:] = content(chunk)
                    if message.chunks:
                        self.prefill.staged(message.req, message.chunks)
                elif isinstance(message, Ended):
                    ends[message.req] = message.reason
            for message in self.decode.wait(0.02):
                if isinstance(message, Ready):
                    for chunk, slot in zip(message.chunks, message.slots, strict=True):
                        size = min(TOKENS - chunk * CHUNK_TOKENS, CHUNK_TOKENS) * TOKEN_BYTES
                        assert bytes(self.decode.slot(slot)[:size]) == content(chunk)[:size]
                    self.decode.release(message.req, message.chunks)
                elif isinstance(message, Ended):
                    ends[message.req] = message.reason
        return ends


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def content(chunk: int) -> bytes:
    return bytes([chunk + 1]) * LAYOUT.chunk_bytes


def hello(role: str) -> Hello:
    return Hello(v=1, engine=f"test-{role}", role=role, rank=0, world_size=1, layout=LAYOUT)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    receiver = Sidecar(SidecarOptions("receiver", 16 * LAYOUT.chunk_bytes, transport="tcp"), tmp_path, tmp_path)
    # With this `drain_timeout_ms` only kept KV can delay the end of the sender.
    options = replace(receiver.options, role="sender", keys={"fetch_port": free_port(), "drain_timeout_ms": 100})
    sender = Sidecar(options, tmp_path, tmp_path)
    try:
        receiver.start()
        sender.start()
        decode = Client.connect(str(receiver.socket), hello("decode"), BOUND_S)
        prefill = Client.connect(str(sender.socket), hello("prefill"), BOUND_S)
        yield Pair(sender, receiver, prefill, decode)
        prefill.close()
        decode.close()
    finally:
        sender.stop()
        receiver.stop()


def test_a_decode_side_fetches_what_a_prefill_side_keeps(pair: Pair) -> None:
    kept, token = pair.keep()
    req = pair.expect(token)
    pair.park(req)
    assert pair.ends(kept, req) == {kept: None, req: None}
    # The request has the decode side's id on the wire, so the records of both sidecars have this id.
    for sidecar in (pair.sender, pair.receiver):
        record = sidecar.record(req)
        assert (record["reason"], record["chunks"], record["bytes"]) == (None, 2, TOKENS * TOKEN_BYTES)
        sidecar.wait_empty()
    # The token has ended, because the KV was delivered.
    late = pair.expect(token)
    pair.park(late)
    assert pair.ends(late) == {late: "duplicate"}


def test_only_what_the_decode_side_lacks_is_moved(pair: Pair) -> None:
    kept, token = pair.keep()
    req = pair.expect(token)
    pair.park(req, have=CHUNK_TOKENS)
    assert pair.ends(kept, req) == {kept: None, req: None}
    record = pair.receiver.record(req)
    assert (record["have_tokens"], record["chunks"], record["bytes"]) == (CHUNK_TOKENS, 1, 7 * TOKEN_BYTES)


def test_kept_requests_are_shown_until_they_are_fetched(pair: Pair) -> None:
    kept, token = pair.keep()
    req = pair.expect(token)
    sender, receiver = pair.sender.metrics, pair.receiver.metrics
    wait_for(lambda: receiver().sum("pd_sidecar_expected_requests") == 1)
    wait_for(lambda: (sender().sum("pd_sidecar_kept_requests"), sender().sum("pd_sidecar_kept_tokens")) == (1, TOKENS))
    (row,) = pair.sender.kept()
    assert (row["side"], row["rank"], row["req"], row["tokens"]) == ("sender", 0, kept, TOKENS)
    assert 0 <= row["kept_ms"] < BOUND_S * 1000
    # Any process that has the token can fetch the KV.
    assert token not in str(row)
    pair.park(req)
    assert pair.ends(kept, req) == {kept: None, req: None}
    wait_for(lambda: pair.sender.kept() == [])
    wait_for(lambda: sender().sum("pd_sidecar_kept_requests") == receiver().sum("pd_sidecar_expected_requests") == 0)
    assert pair.sender.process is not None
    assert pair.receiver.process is not None
    processes = (pair.sender.process, pair.receiver.process)
    wait_for(lambda: req in "".join(process.output() for process in processes))
    assert not any(token in process.output() for process in processes)


def test_a_request_that_is_not_wanted_frees_the_blocks_at_once(pair: Pair) -> None:
    kept, token = pair.keep()
    req = pair.expect(token)
    pair.decode.abort(req)
    assert pair.ends(kept)[kept] == "unwanted"


def test_kv_that_nobody_fetches_ends(pair: Pair) -> None:
    kept, token = pair.keep(keep_ms=300)
    assert pair.ends(kept) == {kept: "unclaimed"}
    req = pair.expect(token)
    pair.park(req)
    assert pair.ends(req) == {req: "unclaimed"}


def test_a_token_that_is_not_known_costs_one_count(pair: Pair) -> None:
    req = pair.expect(secrets.token_hex(16))
    pair.park(req)
    assert pair.ends(req) == {req: "not_kept"}
    stale = pair.expect(secrets.token_hex(16), epoch=5)
    pair.park(stale)
    assert pair.ends(stale) == {stale: "stale_epoch"}
    counts = pair.sender.metrics()
    assert counts.sum("pd_sidecar_fetches_refused_total", reason="not_kept") >= 1


def test_the_end_of_the_prefill_engine_is_heard_in_the_queue(pair: Pair) -> None:
    _, token = pair.keep()
    req = pair.expect(token)
    pair.prefill.close()
    wait_for(lambda: pair.sender.metrics().sum("pd_sidecar_fetches_refused_total", reason="engine_gone") > 0)
    pair.park(req)
    assert pair.decode.wait(BOUND_S) == [Ended(req, "engine_gone", 0)]


def test_a_prefill_sidecar_that_dies_ends_the_wait(pair: Pair) -> None:
    _, token = pair.keep()
    req = pair.expect(token)
    pair.sender.kill()
    pair.park(req)
    # The receiver may notice the loss before the request parks, or after it.
    assert pair.ends(req)[req] in ("no_link", "peer_lost")


def test_a_stranger_learns_nothing_and_connects_the_sidecar_to_nothing(pair: Pair) -> None:
    """A process without a token must not be able to use the sidecar's fetch port as a proxy."""
    listener = zmq.Context.instance().socket(zmq.ROUTER)
    target = listener.bind_to_random_port("tcp://127.0.0.1")
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.linger = 0
    stranger.rcvtimeo = 20_000
    stranger.connect(f"tcp://127.0.0.1:{pair.port.port}")
    to = {"host": "127.0.0.1", "init_port": target, "alloc_port": target}
    fetch = {"type": "Fetch", "v": 1, "token": secrets.token_hex(16), "epoch": 0, "req": "x", "to": to}
    stranger.send_multipart([msgspec.msgpack.encode(fetch)])
    answer = msgspec.msgpack.decode(stranger.recv_multipart()[-1])
    assert (answer["type"], answer["reason"]) == ("Gone", "not_kept")
    assert not listener.poll(500)
    stranger.close()
    listener.close(linger=0)


def test_a_sender_ends_when_its_kept_kv_is_fetched(pair: Pair) -> None:
    kept, token = pair.keep()
    req = pair.expect(token)
    process = pair.sender.process
    assert process is not None
    process.signal(signal.SIGTERM)
    wait_for(lambda: is_draining(pair.sender))
    late, _ = pair.keep()
    assert pair.ends(late) == {late: "draining"}
    pair.park(req)
    assert pair.ends(kept, req) == {kept: None, req: None}
    assert process.wait(BOUND_S) == 0, process.tail()
    assert pair.receiver.record(req)["bytes"] == TOKENS * TOKEN_BYTES


def test_a_sender_does_not_wait_for_kv_that_expires(pair: Pair) -> None:
    kept, _ = pair.keep(keep_ms=1500)
    process = pair.sender.process
    assert process is not None
    process.signal(signal.SIGTERM)
    assert pair.ends(kept) == {kept: "unclaimed"}
    assert process.wait(BOUND_S) == 0, process.tail()


def test_a_second_signal_ends_a_sender_that_keeps_kv(pair: Pair) -> None:
    pair.keep()
    process = pair.sender.process
    assert process is not None
    wait_for(lambda: len(pair.sender.kept()) == 1)
    process.signal(signal.SIGTERM)
    wait_for(lambda: is_draining(pair.sender))
    process.signal(signal.SIGTERM)
    assert process.wait(BOUND_S) == 75, process.tail()


def test_the_drain_command_waits_until_kept_kv_is_fetched(pair: Pair) -> None:
    kept, token = pair.keep()
    req = pair.expect(token)
    assert drain(pair.sender).returncode == 0
    assert is_draining(pair.sender)
    late = drain(pair.sender, "--until-fetched", "--timeout", "1")
    assert (late.returncode, "not fetched all KV within 1 s" in late.stderr) == (75, True), late
    command = subprocess.Popen(drain_command(pair.sender, "--until-fetched"), stdout=subprocess.PIPE, text=True)
    refused, _ = pair.keep()
    assert pair.ends(refused) == {refused: "draining"}
    assert command.poll() is None
    pair.park(req)
    assert pair.ends(kept, req) == {kept: None, req: None}
    output, _ = command.communicate(timeout=BOUND_S)
    assert command.returncode == 0
    assert "no KV is kept" in output
    # The sidecar still runs, because the engine needs it for answers about requests that were routed before.
    assert pair.sender.record(req)["bytes"] == TOKENS * TOKEN_BYTES


def is_draining(sidecar: Sidecar) -> bool:
    return "draining" in call(f"{sidecar.admin}/ready")[1]


def drain(sidecar: Sidecar, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(drain_command(sidecar, *flags), capture_output=True, text=True, timeout=BOUND_S, check=False)


def drain_command(sidecar: Sidecar, *flags: str) -> list[str]:
    return [str(BINARIES / "sidecar"), "drain", "--socket", str(sidecar.socket), *flags]
