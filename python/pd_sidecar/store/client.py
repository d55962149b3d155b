"""A client of a store: LMCache's `lm://` protocol over TCP, as `pd-store` serves it.

A request has nine numbers and a key of 150 bytes, padded with spaces; an answer has nine numbers. All numbers are
signed, have 32 bits, and are little-endian. A PUT has no answer. The store answers the requests of one connection in
their order, so this client sends several requests before it reads the first answer.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

log = logging.getLogger(__name__)

KEY_BYTES = 150
"""The longest key, in bytes."""

_PUT, _GET, _EXIST, _HEALTH = 1, 2, 3, 5
_OK = 200
# The kind of value: bytes without a tensor's shape (LMCache: BINARY, uint8).
_BINARY, _UINT8 = 4, 6
_REQUEST = struct.Struct(f"<9i{KEY_BYTES}s")
_ANSWER = struct.Struct("<9i")
# Requests that are on their way at the same time. Their heads fit into any socket's buffers, so the client is never
# blocked while it sends and the store waits for the client to read.
_WINDOW = 64

Result = TypeVar("Result")


class StoreError(OSError):
    """The store is away, too slow, or sent something that is no answer. The caller goes on without the store."""


@dataclass(frozen=True)
class Bounds:
    """The bounds of waiting for a store."""

    timeout_s: float = 2.0
    """Seconds for a connection, and for the answers of a call without values."""
    least_rate: int = 8 << 20
    """Bytes per second that values take at least. A call with values may take its size divided by this, longer."""
    pause_s: float = 1.0
    """After a failure, calls fail at once for this number of seconds, so that not each call waits for its timeout."""


class StoreClient:
    """The connections to one store. All methods may be called by several threads at the same time."""

    def __init__(self, url: str, bounds: Bounds | None = None) -> None:
        """`url` is `lm://host:port`. Raises ValueError for another form."""
        self._address = address_of(url)
        self._url = url
        self._bounds = bounds or Bounds()
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._paused_until = 0.0
        self._closed = False

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Returns for each key whether the store has a value. Raises StoreError."""
        return self._run(0, lambda connection: connection.exists(keys))

    def put(self, values: Sequence[tuple[bytes, memoryview]]) -> None:
        """Puts values. Returns when the store has received all of them. Raises StoreError."""
        self._run(sum(len(value) for _, value in values), lambda connection: connection.put(values))

    def get(self, values: Sequence[tuple[bytes, memoryview]]) -> list[bool]:
        """Writes the value of each key into the key's memory. Returns for each key whether it was there.

        A value of another length than its memory counts as absent, and nothing of it is written. Raises StoreError;
        then any of the memory may have been written.
        """
        return self._run(sum(len(value) for _, value in values), lambda connection: connection.get(values))

    def close(self) -> None:
        """Closes the idle connections. Calls that run go on, and close theirs at their end."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _run(self, size: int, call: Callable[[_Connection], Result]) -> Result:
        """Runs a call on an idle connection or on a new one.

        The store may have ended an idle connection, for example by a restart, so such a call is repeated on a new
        connection. Every call can be repeated: a value of a key never changes.
        """
        bound_s = self._bounds.timeout_s + size / self._bounds.least_rate
        if (connection := self._take()) is not None:
            try:
                with self._used(connection, bound_s):
                    return call(connection)
            except TimeoutError as error:
                raise self._away(error) from error
            except OSError:
                log.debug("store %s: an idle connection has ended", self._url)
        if time.monotonic() < self._paused_until:
            raise StoreError(f"{self._url} failed a moment ago")
        try:
            connection = _Connection(self._address, self._bounds.timeout_s)
            with self._used(connection, bound_s):
                result = call(connection)
        except OSError as error:
            raise self._away(error) from error
        if self._paused_until != 0.0:
            self._paused_until = 0.0
            log.warning("store %s answers again", self._url)
        return result

    def _away(self, error: OSError) -> StoreError:
        """Notes a failure, and returns the error for the caller. Only the first failure in a row is logged."""
        if self._paused_until == 0.0:
            log.warning("store %s: %s; prompts are computed instead", self._url, error)
        self._paused_until = time.monotonic() + self._bounds.pause_s
        return StoreError(f"{self._url}: {error}")

    def _take(self) -> _Connection | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    @contextlib.contextmanager
    def _used(self, connection: _Connection, bound_s: float) -> Iterator[None]:
        """Keeps a connection for later calls if the present call ends well, and closes it otherwise."""
        connection.begin(bound_s)
        kept = False
        try:
            yield
            with self._lock:
                kept = not self._closed
                if kept:
                    self._idle.append(connection)
        finally:
            if not kept:
                connection.close()


class _Connection:
    """One TCP connection."""

    def __init__(self, address: tuple[str, int], timeout_s: float) -> None:
        self._socket = socket.create_connection(address, timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._deadline = 0.0

    def begin(self, bound_s: float) -> None:
        """Begins a call that may take `bound_s` seconds in all."""
        self._deadline = time.monotonic() + bound_s

    def close(self) -> None:
        self._socket.close()

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        found = []
        for part in _windows(keys):
            self._send(b"".join(_head(_EXIST, key) for key in part))
            found += [self._answer()[0] for _ in part]
        return found

    def put(self, values: Sequence[tuple[bytes, memoryview]]) -> None:
        for key, value in values:
            self._send(_head(_PUT, key, len(value)))
            self._send(value)
        # A PUT has no answer. The store has read all before it answers this.
        self._send(_head(_HEALTH, b""))
        self._answer()

    def get(self, values: Sequence[tuple[bytes, memoryview]]) -> list[bool]:
        found = []
        for part in _windows(values):
            self._send(b"".join(_head(_GET, key) for key, _ in part))
            for _, memory in part:
                there, length = self._answer()
                fits = there and length == len(memory)
                if fits:
                    self._receive(memory)
                elif there:
                    self._skip(length)
                found.append(fits)
        return found

    def _answer(self) -> tuple[bool, int]:
        """Reads an answer: whether there is a value, and the value's bytes."""
        head = bytearray(_ANSWER.size)
        self._receive(memoryview(head))
        code, length, *_ = _ANSWER.unpack(head)
        if code not in (_OK, 400) or length < 0:
            raise StoreError(f"no answer of a store: code {code}, length {length}")
        return code == _OK, length

    def _send(self, data: bytes | memoryview) -> None:
        self._socket.settimeout(self._left())
        self._socket.sendall(data)

    def _receive(self, memory: memoryview) -> None:
        while memory:
            self._socket.settimeout(self._left())
            count = self._socket.recv_into(memory)
            if count == 0:
                raise StoreError("the store has closed the connection")
            memory = memory[count:]

    def _skip(self, length: int) -> None:
        scratch = memoryview(bytearray(min(length, 1 << 20)))
        while length:
            part = scratch[: min(length, len(scratch))]
            self._receive(part)
            length -= len(part)

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the store is too slow")
        return left


def address_of(url: str) -> tuple[str, int]:
    """Returns host and port of `lm://host:port`. Raises ValueError for another form."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme != "lm" or not parts.hostname or not port or parts.path.strip("/") or parts.query:
        raise ValueError(f"url: {url!r} is not of the form lm://host:port, for example lm://10.1.0.7:65432")
    return parts.hostname, port


def _head(command: int, key: bytes, length: int = 0) -> bytes:
    if len(key) > KEY_BYTES:
        raise ValueError(f"a key of {len(key)} bytes; a store takes {KEY_BYTES}")
    return _REQUEST.pack(command, length, _BINARY, _UINT8, 0, length, 0, 0, 0, key.ljust(KEY_BYTES))


def _windows(items: Sequence[Result]) -> Iterator[Sequence[Result]]:
    for first in range(0, len(items), _WINDOW):
        yield items[first : first + _WINDOW]
