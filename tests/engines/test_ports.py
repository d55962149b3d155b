"""Tests bad input at every port and socket. The program must refuse the input or close the connection, and must still
serve other clients.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import msgspec
import pytest
import zmq
from harness.client import call
from harness.pair import Pair
from harness.prompts import prompt
from harness.reference import Reference

Address = tuple[str, int] | str

# Bytes of clients that use another protocol, or that attack.
RAW = {
    "nothing": b"",
    "random": random.Random(1).randbytes(4096),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(100_000),
    "ones": b"\xff" * 100_000,
    # A ZMTP greeting whose first frame announces 2^63 bytes.
    "huge frame": b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\0NULL" + bytes(48) + b"\x02\x7f" + b"\xff" * 7,
    # A local frame that announces 4 GiB.
    "huge local frame": struct.pack("<I", 0xFFFF_FFFF) + b"\x81",
    "truncated local frame": struct.pack("<I", 100) + b"\x81\xa4type\xa5Hello",
}

# Payloads inside correct ZeroMQ frames.
PAYLOADS = {
    "empty": b"",
    "garbage": b"\xc1\xc1\xc1",
    "no map": msgspec.msgpack.encode([1, 2, 3]),
    "unknown type": msgspec.msgpack.encode({"type": "Surprise", "x": {"v": 99}}),
    "missing fields": msgspec.msgpack.encode({"type": "AllocRequest"}),
    "wrong types": msgspec.msgpack.encode({"type": "NixlInitRequest", "local_meta_bytes": "text"}),
    "bad key": msgspec.msgpack.encode(
        {
            "type": "AllocRequest",
            "keys": ["no-key-at-all"],
            "fmt": 1,
            "shape": [2, 4, 256, 128],
            "dtype": "float",
            "last_chunk_toks": 256,
            "req_id": "nobody",
            "is_last_batch": True,
            "total_chunks": 1,
        }
    ),
    "deep": b"\x91" * 100_000 + b"\xc0",
    "oversized": msgspec.msgpack.encode({"type": "ProxyNotif", "req_id": "x" * 8_000_000}),
}


def addresses(pair: Pair) -> dict[str, Address]:
    """Returns every port and socket of both sidecars and the proxy."""

    def of(url: str) -> Address:
        parts = urlsplit(url)
        return str(parts.hostname), int(parts.port or 0)

    return {
        "init": (pair.receiver.host, pair.receiver.init_port),
        "alloc": (pair.receiver.host, pair.receiver.alloc_port),
        "tcp data": (pair.receiver.host, pair.receiver.tcp_port),
        "registration": of(f"tcp://{pair.proxy.registration}"),
        "sender admin": of(pair.sender.admin),
        "receiver admin": of(pair.receiver.admin),
        "proxy": of(pair.proxy.url),
        "sender socket": str(pair.sender.socket),
        "receiver socket": str(pair.receiver.socket),
    }


@contextlib.contextmanager
def survived(pair: Pair, reference: Reference, seed: int) -> Iterator[None]:
    """Checks after the block that the same processes still run, and that a request succeeds."""
    parts = (pair.sender, pair.receiver, pair.proxy, pair.prefill, pair.decode)
    before = [part.pid for part in parts]
    yield
    assert [part.pid for part in parts] == before
    assert all(part.running for part in parts)
    tokens = prompt(300, seed=seed)
    pair.move(tokens).check(reference.token_ids(tokens), len(tokens))


def throw(address: Address, data: bytes) -> None:
    """Connects, sends, reads until the other side closes or stops sending, and closes. The other side may close
    earlier.
    """
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as stream, contextlib.suppress(ConnectionError, TimeoutError):
        stream.settimeout(0.3)
        stream.connect(address)
        stream.sendall(data)
        while stream.recv(65536):
            pass


@pytest.mark.parametrize("name", RAW)
def test_raw_bytes_everywhere(pair: Pair, reference: Reference, name: str) -> None:
    with survived(pair, reference, seed=80):
        for address in addresses(pair).values():
            throw(address, RAW[name])


def test_many_connections_that_say_nothing(pair: Pair, reference: Reference) -> None:
    with survived(pair, reference, seed=81), contextlib.ExitStack() as stack:
        for address in addresses(pair).values():
            for _ in range(50):
                family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
                stream = stack.enter_context(socket.socket(family))
                stream.settimeout(1.0)
                with contextlib.suppress(OSError):
                    stream.connect(address)
        # The connections are still open. A request succeeds at the same time.
        tokens = prompt(300, seed=82)
        pair.move(tokens).check(reference.token_ids(tokens), len(tokens))


@pytest.mark.parametrize("name", PAYLOADS)
def test_bad_messages(pair: Pair, reference: Reference, name: str) -> None:
    context = zmq.Context()
    with survived(pair, reference, seed=83):
        for port, kind, frames in _zmq_targets(pair):
            peer = context.socket(kind)
            peer.linger = 0
            peer.connect(f"tcp://{port}")
            peer.send_multipart(frames(PAYLOADS[name]))
            # The test accepts both an answer and no answer.
            peer.poll(200)
            peer.close()
    context.term()


def _zmq_targets(pair: Pair) -> list[tuple[str, int, Callable[[bytes], list[bytes]]]]:
    receiver = pair.receiver
    return [
        (f"{receiver.host}:{receiver.init_port}", zmq.REQ, lambda payload: [payload]),
        (f"{receiver.host}:{receiver.alloc_port}", zmq.DEALER, lambda payload: [b"", payload]),
        (f"{receiver.host}:{receiver.alloc_port}", zmq.DEALER, lambda payload: [payload] * 20),
        (pair.proxy.registration, zmq.PUSH, lambda payload: [payload]),
    ]


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_wrong_hello(pair: Pair, reference: Reference, which: str) -> None:
    """Checks that an engine of another model, layout, rank or protocol version is refused with the right reason."""
    sidecar = getattr(pair, which)
    layout = sidecar.status()["ranks"][0]["layout"]
    hello = {
        "type": "Hello",
        "v": 1,
        "engine": "test",
        "role": "prefill" if which == "sender" else "decode",
        "rank": 0,
        "world_size": 1,
        "layout": layout,
    }
    with survived(pair, reference, seed=84):
        for change, word in (
            ({"v": 99}, "version"),
            ({"layout": {**layout, "model": "another"}}, "model"),
            ({"layout": {**layout, "kv_heads": 3}}, "kv_heads"),
            ({"rank": 5}, "rank"),
        ):
            refusal = _greet(str(sidecar.socket), {**hello, **change})
            assert refusal["type"] == "Refused", (change, refusal)
            assert word in refusal["text"], (change, refusal)


def _greet(path: str, hello: dict[str, object]) -> dict[str, str]:
    body = msgspec.msgpack.encode(hello)
    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(30.0)
        stream.connect(path)
        stream.sendall(struct.pack("<I", len(body)) + body)
        (length,) = struct.unpack("<I", stream.recv(4, socket.MSG_WAITALL))
        answer: dict[str, str] = msgspec.msgpack.decode(stream.recv(length, socket.MSG_WAITALL))
        return answer


def test_admin_and_proxy_refuse_what_they_do_not_know(pair: Pair, reference: Reference) -> None:
    with survived(pair, reference, seed=85):
        for url in (pair.sender.admin, pair.receiver.admin, pair.proxy.url):
            assert call(f"{url}/nothing-here")[0] == 404
            assert call(f"{url}/metrics", method="DELETE")[0] == 405
        assert call(f"{pair.receiver.admin}/registered", {"proxy": "x:1", "id": "nobody", "epoch": 1})[0] == 409
        assert 400 <= call(f"{pair.receiver.admin}/registered", {"surprise": 1})[0] < 500
        assert 400 <= call(f"{pair.proxy.url}/v1/completions", [1, 2])[0] < 500
