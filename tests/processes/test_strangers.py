"""Connects unknown peers and LMCache to every port and socket of a pair of sidecars, and sends false messages. No
engine runs.

After each test, a push between the same two processes must still work.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import zmq
from harness.client import call
from harness.sidecar import CHUNK_TOKENS, NO_PUSH, Sidecar, SidecarOptions
from harness.waiting import until

from pd_sidecar.client import Client, Lost
from pd_sidecar.sidecar.connection import Connection
from pd_sidecar.sidecar.wire import Ended, Granted, Hello, Layout, Ready, Target

FIXTURES = Path(__file__).resolve().parent.parent.parent / "protocol" / "fixtures"
LAYOUT = Layout("tiny", "bfloat16", 2, 2, 16, False, CHUNK_TOKENS)
BOUND_S = 60.0
# A sidecar that disconnects an engine leaves the engine its slots for this time.
READS_S = 2.0

pytestmark = pytest.mark.skipif(NO_PUSH, reason="nothing can be pushed")


@dataclass
class Sides:
    """Two sidecars, each with a client that takes the place of an engine."""

    sender: Sidecar
    receiver: Sidecar
    prefill: Client
    decode: Client
    pushed: int = 0

    @property
    def target(self) -> Target:
        return Target(self.receiver.host, self.receiver.init_port, self.receiver.alloc_port)

    def check(self) -> None:
        """Pushes a request of two chunks and reads it."""
        self.pushed += 1
        req, tokens = f"check-{os.getpid()}-{self.pushed}", CHUNK_TOKENS + 7
        assert self.push(req, keys(req), keys(req), tokens) == (None, None)

    def push(self, req: str, asked: list[str], awaited: list[str], tokens: int) -> tuple[str | None, str | None]:
        """Pushes a request. Returns the reason of each side's end; `None` means success."""
        self.decode.await_(req, awaited, tokens=tokens, have_tokens=0, deadline_ms=30_000)
        self.prefill.reserve(req, self.target, asked, tokens=tokens, upto=tokens, overlap=True)
        ends: dict[str, str | None] = {}
        deadline = time.monotonic() + BOUND_S
        while len(ends) < 2:
            assert time.monotonic() < deadline, f"{req}: ended only at {list(ends)}"
            for message in self.prefill.wait(0.02):
                if isinstance(message, Granted) and message.req == req:
                    for chunk, slot in zip(message.chunks, message.slots, strict=True):
                        self.prefill.slot(slot)[:] = content(req, chunk)
                    self.prefill.staged(req, message.chunks)
                elif isinstance(message, Ended) and message.req == req:
                    ends["prefill"] = message.reason
            for message in self.decode.wait(0.02):
                if isinstance(message, Ready) and message.req == req:
                    for chunk, slot in zip(message.chunks, message.slots, strict=True):
                        size = min(tokens - chunk * CHUNK_TOKENS, CHUNK_TOKENS) * token_bytes()
                        assert bytes(self.decode.slot(slot)[:size]) == content(req, chunk)[:size]
                    self.decode.release(req, message.chunks)
                elif isinstance(message, Ended) and message.req == req:
                    ends["decode"] = message.reason
        return ends["prefill"], ends["decode"]


def refusal(sidecar: Sidecar, greeting: Hello) -> str:
    """Returns the reason for which a sidecar refuses an engine."""
    client = Client(str(sidecar.socket), greeting)
    try:
        until("the engine is not refused", lambda: bool(client._reconnector.failure))
        return client._reconnector.failure
    finally:
        client.close()


def keys(name: str, chunks: int = 2) -> list[str]:
    return [f"tiny@1@0@{abs(hash(name)) + chunk:x}@bfloat16" for chunk in range(chunks)]


def token_bytes() -> int:
    return LAYOUT.chunk_bytes // CHUNK_TOKENS


def content(req: str, chunk: int) -> bytes:
    word = struct.pack("<Q", (hash(req) + chunk) & (2**64 - 1))
    return word * (LAYOUT.chunk_bytes // len(word))


def hello(role: str, layout: Layout = LAYOUT) -> Hello:
    return Hello(v=1, engine=f"test-{role}", role=role, rank=0, world_size=1, layout=layout)


@pytest.fixture(scope="module", params=["tcp", "nixl"])
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    folder = tmp_path_factory.mktemp(f"ports-{request.param}")
    # On a busy machine the push may reach the receiver before the request that awaits it. The default wait is 50 ms.
    parked: dict[str, object] = {"park_ms": 3000}
    options = SidecarOptions("receiver", 16 * LAYOUT.chunk_bytes, transport=request.param, keys=parked)
    receiver = Sidecar(options, folder, folder)
    sender = Sidecar(replace(options, role="sender"), folder, folder)
    try:
        receiver.start()
        sender.start()
        decode = Client.connect(str(receiver.socket), hello("decode"), BOUND_S)
        prefill = Client.connect(str(sender.socket), hello("prefill"), BOUND_S)
        yield Sides(sender, receiver, prefill, decode)
        prefill.close()
        decode.close()
    finally:
        sender.stop()
        receiver.stop()


@pytest.fixture(autouse=True)
def others_are_served(sides: Sides) -> Iterator[None]:
    sides.check()
    yield
    sides.check()
    sides.sender.wait_empty()
    sides.receiver.wait_empty()
    assert sides.sender.running and sides.receiver.running


@contextmanager
def peer(kind: int, port: int, identity: bytes = b"") -> Iterator[Any]:
    context = zmq.Context.instance()
    peer = context.socket(kind)
    peer.linger = 0
    peer.rcvtimeo = 20_000
    if identity:
        peer.identity = identity
    peer.connect(f"tcp://127.0.0.1:{port}")
    try:
        yield peer
    finally:
        peer.close()


def fixture(name: str) -> bytes:
    return (FIXTURES / f"{name}.bin").read_bytes()


def unpacked(body: bytes) -> dict[str, Any]:
    message: dict[str, Any] = msgspec.msgpack.decode(body)
    return message


def packed(message: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode(message)


def test_lmcache_with_other_chunks_is_introduced_and_refused_in_its_own_words(sides: Sides) -> None:
    metadata = (FIXTURES / "metadata_sender.bin").read_bytes()
    with peer(zmq.REQ, sides.receiver.init_port) as init:
        init.send(packed({"type": "NixlInitRequest", "local_meta_bytes": metadata}))
        answer = unpacked(init.recv())
        assert answer["type"] == "NixlInitResponse" and "x" not in answer
        assert answer["remote_agent_name"] == b"sender-1111"
        init.send(fixture("mem_reg_request_lmcache"))
        answer = unpacked(init.recv())
        assert answer["type"] == "NixlMemRegResponse" and "x" not in answer
        assert b"nixlXferDList" in answer["remote_xfer_dlist_bytes"]
    asked = fixture("alloc_request_lmcache_async")
    with peer(zmq.DEALER, sides.receiver.alloc_port, b"sender-pid1-0a-to-x") as alloc:
        for frames in ([b"", asked], [asked]):
            alloc.send_multipart(frames)
            reply = alloc.recv_multipart()
            assert reply[:-1] == frames[:-1]
            assert unpacked(reply[-1])["remote_indexes"] == [-1, -1]
        alloc.send_multipart([b"", fixture("cancel_notif_lmcache")])
        assert unpacked(alloc.recv_multipart()[-1])["remote_indexes"] == []
    with peer(zmq.REQ, sides.receiver.alloc_port) as alloc:
        for _ in range(2):
            alloc.send(fixture("alloc_request_lmcache_sync"))
            assert unpacked(alloc.recv())["remote_indexes"] == [-1, -1]


@pytest.mark.parametrize("port", ["init_port", "alloc_port"])
def test_what_is_no_message_ends_only_its_own_connection(sides: Sides, port: str) -> None:
    number = getattr(sides.receiver, port)
    label = port.removesuffix("_port")
    before = sides.receiver.metrics().sum("pd_sidecar_malformed_frames", port=label)
    samples = [
        b"\x01\x02",
        b"",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1x" + b"\x91" * 100_000,
        packed({"type": "SideMsg", "data": 1}),
        packed({"type": "CacheQueryRequest", "keys": ["a@1"]}),
        fixture("register"),
        fixture("alloc_request")[:-3],
    ]
    for count, sample in enumerate(samples, start=1):
        with peer(zmq.DEALER, number) as stranger:
            stranger.send_multipart([b"", sample])
            # The socket stays open until the receiver has read the message: a socket that closes drops what it has not
            # sent yet.
            deadline = time.monotonic() + BOUND_S
            while sides.receiver.metrics().sum("pd_sidecar_malformed_frames", port=label) < before + count:
                assert time.monotonic() < deadline, f"the receiver did not count {sample[:20]!r}"
            assert not stranger.poll(100), "an answer to no message"
    after = sides.receiver.metrics().sum("pd_sidecar_malformed_frames", port=label)
    assert after - before == len(samples)


def test_odd_frames_and_a_message_that_is_too_long(sides: Sides) -> None:
    for name in ("init", "alloc"):
        before = port_events(sides, name)
        wanted = before["wrong_frames"] + 2
        with ExitStack() as stack:
            # A socket that closes drops what it has not sent yet. So all sockets stay open until the receiver has read
            # the messages.
            strangers: list[Any] = []
            for frames in ([b"a", b"b"], [b"", b"", b"c"], [b""] * 1000, [b"", bytes(5 << 20)]):
                stranger = stack.enter_context(peer(zmq.DEALER, getattr(sides.receiver, f"{name}_port")))
                stranger.send_multipart(frames)
                strangers.append(stranger)
            until("the frames are not counted", lambda: port_events(sides, name)["wrong_frames"] >= wanted)  # noqa: B023
            assert not any(stranger.poll(100) for stranger in strangers)


def port_events(sides: Sides, port: str) -> dict[str, float]:
    names = ("connections", "wrong_frames", "evicted", "unread", "failed_handshakes")
    metrics = sides.receiver.metrics()
    return {name: metrics.sum("pd_sidecar_port_events", port=port, event=name) for name in names}


def raw(port: int, data: bytes, path: Path | None = None) -> socket.socket:
    if path is None:
        stream = socket.create_connection(("127.0.0.1", port), timeout=20)
        stream.settimeout(5)
    else:
        stream = socket.socket(socket.AF_UNIX)
        stream.settimeout(5)
        stream.connect(str(path))
    # The sidecar may close the connection before it has read all bytes. This is expected.
    with suppress(OSError):
        stream.sendall(data)
    return stream


GARBAGE = [
    b"",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    bytes(70_000),
    b"\xff" * 70_000,
    b"\xff\0\0\0\0\0\0\0\0\x7f\x03\0NULL" + bytes(48) + b"\x02" + b"\xff" * 8,
    b"\x89pdkv\r\n\0" + b"\xff" * 200,
    os.urandom(4096),
]


def test_garbage_on_every_port_while_pushes_go_on(sides: Sides) -> None:
    admins = [urlsplit(part.admin).port or 0 for part in (sides.sender, sides.receiver)]
    ports = [sides.receiver.init_port, sides.receiver.alloc_port, *admins, *data_ports(sides)]
    before = port_events(sides, "alloc")["failed_handshakes"]
    held = [raw(port, data) for port in ports for data in GARBAGE]
    held += [raw(0, data, path) for path in (sides.sender.socket, sides.receiver.socket) for data in GARBAGE]
    # Keep half-open connections, too.
    held += [raw(port, b"") for port in ports for _ in range(50)]
    for _ in range(5):
        sides.check()
    until("no garbage is counted", lambda: port_events(sides, "alloc")["failed_handshakes"] > before)
    for stream in held:
        stream.close()
    for part in (sides.sender, sides.receiver):
        assert call(f"{part.admin}/health", timeout_s=20)[0] == 200


def test_an_engine_that_is_cut_off_keeps_for_a_while_what_it_was_shown(sides: Sides) -> None:
    req, tokens = f"cut-{os.getpid()}", CHUNK_TOKENS
    reader = Client.connect(str(sides.receiver.socket), hello("decode"), BOUND_S)
    reader.await_(req, keys(req, 1), tokens=tokens, have_tokens=0, deadline_ms=30_000)
    sides.prefill.reserve(req, sides.target, keys(req, 1), tokens=tokens, upto=tokens)
    shown: list[int] = []
    deadline = time.monotonic() + BOUND_S
    while not shown and time.monotonic() < deadline:
        for message in sides.prefill.wait(0.02):
            if isinstance(message, Granted) and message.chunks:
                sides.prefill.staged(req, message.chunks)
        shown += [slot for message in reader.wait(0.02) if isinstance(message, Ready) for slot in message.slots]
    assert len(shown) == 1
    began = time.monotonic()
    os.write(reader.connection.fileno(), struct.pack("<I", 4) + b"\xc1" * 4)
    # When the client reports the loss of a connection, it may already have a new connection. So this test does not
    # check `connected`.
    lost: list[Lost] = []
    while not lost and time.monotonic() < deadline:
        lost += [event for event in reader.wait(0.02) if isinstance(event, Lost)]
    # The engine gets the error at once, but it may still be reading the slot.
    assert lost
    for _ in range(2):
        held = sides.receiver.slots()[1]
        # On a busy machine the time for which the engine may read can be over before this test looks.
        assert held == 1 or time.monotonic() - began > READS_S
        time.sleep(1)
    sides.receiver.wait_empty()
    reader.close()


def data_ports(sides: Sides) -> list[int]:
    """Returns the data port that the receiver advertises, if it has one."""
    with peer(zmq.REQ, sides.receiver.init_port) as init:
        init.send(fixture("init_request"))
        offered = unpacked(init.recv())["x"]["transports"]
    return [int(wire["address"].rsplit(":", 1)[1]) for wire in offered if wire["kind"] == "tcp"]


def test_other_versions_and_layouts_are_told_what_differs(sides: Sides) -> None:
    def refused(**changes: Any) -> dict[str, str]:
        request = unpacked(fixture("init_request"))
        request["x"]["layout"] = msgspec.to_builtins(LAYOUT)
        for name, value in changes.items():
            where = request["x"] if name in request["x"] else request["x"]["layout"]
            where[name] = value
        with peer(zmq.REQ, sides.receiver.init_port) as init:
            init.send(packed(request))
            told: dict[str, str] = unpacked(init.recv())["x"].get("refused") or {"reason": "", "text": ""}
            return told

    assert refused() == {"reason": "", "text": ""}
    assert refused(v=2)["reason"] == "version_mismatch"
    for name, value in {"model": "other", "dtype": "half", "layers": 3, "chunk_tokens": 128}.items():
        told = refused(**{name: value})
        assert told["reason"] == "layout_mismatch"
        assert told["text"].startswith(f"{name}: prefill-0 has {value}, ")
    assert refused(layout=None)["reason"] == "no_engine"


def test_an_engine_of_another_layout_is_refused(sides: Sides) -> None:
    other = hello("decode", msgspec.structs.replace(LAYOUT, layers=5))
    assert "layers" in refusal(sides.receiver, other)


def test_an_engine_that_moves_nothing_beside_one_that_moves_stops_nobody(sides: Sides) -> None:
    """If a sidecar refuses an engine, for example because the engine uses the wrong socket, the connector sends a
    greeting that says that the engine moves no KV.
    """
    other = hello("decode").as_unmoved("its sidecar refuses this engine")
    stand_in = Connection.open(str(sides.receiver.socket), other, 5.0)
    try:
        request = unpacked(fixture("init_request"))
        request["x"]["layout"] = msgspec.to_builtins(LAYOUT)
        with peer(zmq.REQ, sides.receiver.init_port) as init:
            init.send(packed(request))
            assert unpacked(init.recv())["x"].get("refused") is None
        assert "unmoved" not in sides.receiver.status()
    finally:
        stand_in.shut()


def test_different_keys_are_no_transfer(sides: Sides) -> None:
    req = f"keys-{os.getpid()}"
    ends = sides.push(req, keys("one"), keys("two"), CHUNK_TOKENS + 7)
    assert ends == ("key_mismatch", "key_mismatch")


def test_a_stranger_writes_under_no_lease(sides: Sides) -> None:
    forged = unpacked(fixture("written"))
    with peer(zmq.DEALER, sides.receiver.alloc_port) as stranger:
        stranger.send_multipart([b"", packed(forged)])
        answer = unpacked(stranger.recv_multipart()[-1])
    assert (answer["type"], answer["lease"]) == ("Unwanted", forged["lease"])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_engine_that_cuts_its_kv_otherwise_is_refused(sides: Sides, rank: int) -> None:
    other = msgspec.structs.replace(hello("prefill"), rank=rank, world_size=2)
    assert f"no sender for rank {rank} of 2: it has 1 ranks" in refusal(sides.sender, other)
