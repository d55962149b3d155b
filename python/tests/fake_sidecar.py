"""Implements a sidecar's local socket for unit tests of its clients, with real frames and a real memfd."""

from __future__ import annotations

import fcntl
import os
import queue
import socket
import struct
import threading
import time
from pathlib import Path

import msgspec

from pd_sidecar.client import Client
from pd_sidecar.sidecar import wire

# A busy machine may stop a thread for seconds. Only a test that hangs waits for so long.
PATIENCE_S = 60.0


class FakeSidecar:
    """Accepts every greeting, records every message, and sends what the test tells it to send."""

    def __init__(self, path, *, slots=8, epoch=1, refuse=None, slot_bytes=None, sealed=True, fetch=None):
        self.path = str(path)
        self.slots = slots
        self.epoch = epoch
        self.refuse = refuse
        self.slot_bytes = slot_bytes
        self.sealed = sealed
        self.fetch = fetch
        self.hellos = []
        self.kept = []
        """The greetings of engines that move no KV. The fake sidecar accepts these greetings even while it refuses
        others.
        """
        self.received = queue.Queue()
        self._connections = []
        self._memory = None
        if path is not None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(self.path)
            self._listener.listen()
            threading.Thread(target=self._accept, daemon=True).start()

    def next(self, kind=None):
        """Returns the next message of the engine, or the next message of this kind."""
        message = self.received.get(timeout=PATIENCE_S)
        assert kind is None or isinstance(message, kind), message
        return message

    def nothing(self):
        """Returns true if no message is left."""
        return self.received.empty()

    def say(self, *messages):
        """Sends messages to the newest connection."""
        for message in messages:
            self._connections[-1].sendall(wire.encode(message))

    def say_bytes(self, data):
        self._connections[-1].sendall(data)

    def read(self, slot, size):
        return os.pread(self._memory, size, slot * self.slot_bytes)

    def write(self, slot, data):
        assert os.pwrite(self._memory, data, slot * self.slot_bytes) == len(data)

    def stop(self):
        """Ends every connection and the listener, as if the sidecar was killed."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        Path(self.path).unlink()
        for connection in self._connections:
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        hello = _read(connection)
        if hello is not None:
            self.serve(connection, hello)

    def serve(self, connection, hello):
        """Serves one connection, from its greeting to its end."""
        self.hellos.append(hello)
        if hello.unmoved:
            self.kept.append(hello)
        elif self.refuse is not None:
            connection.sendall(wire.encode(self.refuse))
            connection.close()
            return
        if hello.unmoved:
            connection.sendall(wire.encode(wire.Welcome(wire.VERSION, "fake", 0, "none", 0, 0, 1)))
            self._connections.append(connection)
            while (message := _read(connection)) is not None:
                self.received.put(message)
            return
        self.slot_bytes = self.slot_bytes or hello.layout.chunk_bytes
        if self._memory is None:
            self._memory = os.memfd_create("slots", os.MFD_ALLOW_SEALING)
            os.ftruncate(self._memory, self.slots * self.slot_bytes)
            if self.sealed:
                fcntl.fcntl(self._memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        welcome = wire.Welcome(
            v=wire.VERSION,
            id="fake",
            epoch=self.epoch,
            memory="memfd",
            slots=self.slots,
            slot_bytes=self.slot_bytes,
            connection=len(self.hellos),
            fetch=self.fetch,
        )
        self._connections.append(connection)
        frame = wire.encode(welcome)
        # Send the answer in two parts: the client must keep the descriptor until the frame is complete.
        socket.send_fds(connection, [frame[:7]], [self._memory])
        connection.sendall(frame[7:])
        while (message := _read(connection)) is not None:
            self.received.put(message)


class RankedSidecar(FakeSidecar):
    """One socket with a fake sidecar for each rank that sends a greeting."""

    def __init__(self, path):
        self.ranks = {}
        super().__init__(path)

    def serve(self, connection, hello):
        """Passes the connection to the fake sidecar of its rank."""
        rank = self.ranks.setdefault(hello.rank, FakeSidecar(None))
        rank.serve(connection, hello)


def refusal(path, hello):
    """Returns the reason why a client gets no connection."""
    client = Client(str(path), hello)
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not client._reconnector.failure:
            assert time.monotonic() < deadline, "the client does not give up"
            time.sleep(0.005)
        return client._reconnector.failure
    finally:
        client.close()


def _read(connection):
    header = _exactly(connection, 4)
    if header is None:
        return None
    body = _exactly(connection, struct.unpack("<I", header)[0])
    return None if body is None else wire.decode_to_sidecar(body)


def _exactly(connection, size):
    data = b""
    while len(data) < size:
        try:
            part = connection.recv(size - len(data))
        except OSError:
            return None
        if not part:
            return None
        data += part
    return data


def raw(value):
    """Returns a frame with any msgpack value in it."""
    body = msgspec.msgpack.encode(value)
    return wire.HEADER.pack(len(body)) + body
