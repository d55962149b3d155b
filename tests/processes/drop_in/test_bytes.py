"""Checks that each message between a sidecar and LMCache has exactly the bytes that msgspec writes."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import generate
import msgspec
import pytest
from harness.drop_in.chunks import Prompt
from harness.drop_in.nodes import LmcacheReceiver, LmcacheSender, OurReceiver, OurSender
from harness.ports import free_port

from pd_sidecar.sidecar.wire import Target

FIELDS: dict[str, list[Any]] = {
    "AllocRequest": [generate.SyncAllocRequest, generate.AsyncAllocRequest],
    "AllocResponse": [generate.SyncAllocResponse, generate.AsyncAllocResponse],
    "CancelNotif": [generate.CancelNotif],
    "NixlInitRequest": [generate.NixlInitRequest],
    "NixlInitResponse": [generate.NixlInitResponse],
    "NixlMemRegRequest": [generate.NixlMemRegRequest],
    "NixlMemRegResponse": [generate.NixlMemRegResponse],
    "ProxyNotif": [generate.ProxyNotif],
}


class Tap:
    """A TCP relay in front of one port. The relay records all bytes in both directions."""

    def __init__(self, port: int) -> None:
        self.port = free_port()
        self._to = port
        self._streams: list[bytearray] = []
        self._server = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._to))
            for source, sink in ((near, far), (far, near)):
                stream = bytearray()
                self._streams.append(stream)
                threading.Thread(target=self._relay, args=(source, sink, stream), daemon=True).start()

    @staticmethod
    def _relay(source: socket.socket, sink: socket.socket, stream: bytearray) -> None:
        try:
            while data := source.recv(1 << 16):
                stream += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def messages(self) -> Iterator[bytes]:
        """Yields the frames of all connections and directions that are msgpack maps."""
        for stream in self._streams:
            for frame in frames(bytes(stream)):
                if frame and frame[0] & 0xF0 == 0x80:
                    yield frame

    def close(self) -> None:
        self._server.close()


def frames(stream: bytes) -> Iterator[bytes]:
    """Yields the message frames of a ZMTP 3 stream, without its greeting and its commands."""
    at = 64
    while at + 2 <= len(stream):
        flags = stream[at]
        if flags & 2:
            if at + 9 > len(stream):
                return
            (length,) = struct.unpack_from(">Q", stream, at + 1)
            at += 9
        else:
            length = stream[at + 1]
            at += 2
        if not flags & 4:
            yield stream[at : at + length]
        at += length


def check(raw: bytes) -> str:
    """Asserts that msgspec writes exactly these bytes, and returns the type of the message."""
    message = msgspec.msgpack.decode(raw)
    name = str(message["type"])
    # In every message, numbers have their shortest form, and no bytes follow the message.
    assert msgspec.msgpack.encode(message) == raw, name
    if "x" not in message:
        fields = {key: value for key, value in message.items() if key != "type"}
        forms = [form for form in FIELDS[name] if set(form.__struct_fields__) == fields.keys()]
        assert raw in [msgspec.msgpack.encode(form(**fields)) for form in forms], message
    return name


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("side", ["our sender", "our receiver"])
def test_messages_are_msgspecs(tmp_path: Path, side: str, mode: str) -> None:
    sender = OurSender(tmp_path) if side == "our sender" else LmcacheSender(mode)
    receiver = LmcacheReceiver(mode) if side == "our sender" else OurReceiver(tmp_path)
    taps = [Tap(receiver.target.init_port), Tap(receiver.target.alloc_port)]
    try:
        to = Target("127.0.0.1", *(tap.port for tap in taps))
        for number, prompt in enumerate([Prompt.of_chunks(1, last=9), Prompt.of_chunks(17, last=100)]):
            assert sender.put(f"b{number}", to, prompt, batch=5).error is None
            assert sender.notices.wait(f"b{number}") is not None
            assert receiver.get(f"b{number}", prompt) == prompt.sums
        seen = [check(raw) for tap in taps for raw in tap.messages()] + [check(raw) for raw in sender.notices.raw]
    finally:
        for part in (sender, receiver):
            part.stop()
        for tap in taps:
            tap.close()
        sender.notices.close()
    wanted = {"NixlInitRequest", "NixlInitResponse", "NixlMemRegRequest", "NixlMemRegResponse"}
    assert set(seen) == wanted | {"AllocRequest", "AllocResponse", "ProxyNotif"}
    assert seen.count("AllocRequest") >= 3
