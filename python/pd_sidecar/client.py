"""A client of a sidecar's local socket: for engine connectors, tools and tests.

    client = Client.connect(default_socket("sender"), Hello(...))
    client.reserve("req-1", Target("10.0.0.2", 7300, 7400), keys, tokens=300, upto=300)
    for message in client.wait(1.0):
        if isinstance(message, Granted):
            for chunk, slot in zip(message.chunks, message.slots):
                client.slot(slot)[: len(data[chunk])] = data[chunk]
            client.staged("req-1", message.chunks)

A second thread watches the connection. When the connection has ended, the thread connects again, with growing pauses;
it never handles messages. Transfers that were in flight end with their connection: `poll` returns `Lost`, and later
`Connected` for a new connection, which has another epoch and another buffer. Only one thread may send and poll
messages.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from pd_sidecar.sidecar.connection import Connection, ConnectionLostError, wait_readable
from pd_sidecar.sidecar.reconnect import Pauses, Reconnector
from pd_sidecar.sidecar.wire import (
    Abort,
    Await,
    Cancel,
    Computing,
    Ended,
    Expect,
    Granted,
    Hello,
    Keep,
    Keeper,
    LayersStaged,
    Ready,
    Refused,
    Release,
    Reserve,
    Staged,
    Target,
    ToEngine,
    ToSidecar,
    Welcome,
    WireError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SOCKET_VARIABLE = "PD_SIDECAR_SOCKET"

SETTLE_S = 0.5
"""The longest time that `settle` waits, in seconds."""


def default_socket(role: str) -> str:
    """Returns the default socket of a sidecar with this role (`sender`, `receiver` or `both`).

    `PD_SIDECAR_SOCKET` has precedence. If this variable is not set, the path follows from `XDG_RUNTIME_DIR` or the
    user's id, by the sidecar's own rule.
    """
    explicit = os.environ.get(SOCKET_VARIABLE)
    if explicit:
        return explicit
    runtime = os.environ.get("XDG_RUNTIME_DIR", "").rstrip("/")
    folder = f"{runtime}/pd-sidecar" if runtime else f"/tmp/pd-sidecar-{os.getuid()}"
    return f"{folder}/{role}.sock"


@dataclass(frozen=True)
class Connected:
    """The client has a new connection. Slots of an earlier connection are no longer valid."""

    welcome: Welcome


@dataclass(frozen=True)
class Lost:
    """The connection has ended, and so have all transfers that were in flight over it."""

    why: str


Event = Union[Connected, Lost, ToEngine]  # noqa: UP007


class NotConnectedError(Exception):
    """The client has no connection at the moment."""


class Client:
    """A connection to one sidecar. The client connects again when the connection has ended."""

    def __init__(
        self,
        path: str,
        hello: Hello,
        pauses: Pauses | None = None,
        logger: logging.Logger | None = None,
    ) -> None:
        """Starts to connect, and returns at once."""
        self.path = path
        self._hello = hello
        self._pauses = pauses or Pauses()
        self._logger = logger or logging.getLogger(__name__)
        self._connection: Connection | None = None
        self._waited_for = 0
        """`settle` has already waited `SETTLE_S` for the connection attempt with this number; 0 if it never has."""
        self._reconnector = Reconnector(path, hello, self._pauses, self._logger)
        self._reconnector.start()

    @classmethod
    def connect(cls, path: str, hello: Hello, timeout_s: float = 10.0) -> Client:
        """Starts a client and waits until it is connected. Raises `TimeoutError` with the last failure."""
        client = cls(path, hello)
        deadline = time.monotonic() + timeout_s
        while not client._adopt():
            if not client._reconnector.connected.wait(deadline - time.monotonic()):
                why = client._reconnector.failure
                client.close()
                raise TimeoutError(f"no connection to {path}: {why or 'no answer'}")
        return client

    @property
    def connected(self) -> bool:
        """True if messages can be sent. The value can be out of date until the next `poll`."""
        return self._connection is not None

    @property
    def connection(self) -> Connection:
        """The current connection. Raises `NotConnectedError`."""
        if self._connection is None:
            raise NotConnectedError(self._reconnector.failure or f"no connection to {self.path}")
        return self._connection

    @property
    def welcome(self) -> Welcome:
        """The sidecar's answer to the greeting: its id, epoch and buffer."""
        return self.connection.welcome

    def slot(self, index: int) -> memoryview:
        """Returns the bytes of a slot, to read or write in place."""
        return self.connection.slot(index)

    def reserve(
        self,
        req: str,
        to: Target,
        keys: list[str],
        *,
        tokens: int,
        upto: int,
        overlap: bool = False,
    ) -> None:
        """Prefill: asks the sidecar to get slots for a request's chunks from the receiver `to`. The answer is
        `Granted`.
        """
        self.send(Reserve(req, to, keys, tokens, upto, overlap))

    def keep(self, req: str, token: str, keys: list[str], *, tokens: int, upto: int, keep_ms: int) -> None:
        """Prefill: tells the sidecar that the engine keeps a request's chunks until a decode side fetches them with the
        token. The sidecar answers `Granted` when a decode side fetches the KV, or `Ended`.
        """
        self.send(Keep(req, token, keys, tokens, upto, keep_ms))

    def computing(self, req: str, upto: int) -> None:
        """Prefill: tells the sidecar that this step computes tokens `[0, upto)`, so that the sidecar can grant slots
        for the chunks of these tokens.
        """
        self.send(Computing(req, upto))

    def staged(
        self,
        req: str,
        chunks: list[int],
        gather_us: int = 0,
        event: int | None = None,
        layers: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Prefill: tells the sidecar that these chunks are in their slots, now or as soon as the event has fired.

        Each entry of `layers` stands for a range of layers. An entry has the first layer after its range, and the event
        that fires when the range is complete. The last range ends with the last layer.
        """
        ranges = [LayersStaged(below, event) for below, event in layers]
        self.send(Staged(req, chunks, gather_us, event, ranges))

    def cancel(self, req: str) -> None:
        """Prefill: tells the sidecar that the request has ended and that the engine no longer writes into its slots."""
        self.send(Cancel(req))

    def expect(self, req: str, token: str, at: Keeper, *, epoch: int, keep_ms: int) -> None:
        """Decode: announces a request whose KV a prefill engine keeps. The sidecar fetches the KV after `await_`."""
        self.send(Expect(req, token, at, epoch, keep_ms))

    def await_(
        self,
        req: str,
        keys: list[str],
        *,
        tokens: int,
        have_tokens: int,
        deadline_ms: int,
        written: bool = False,
    ) -> None:
        """Decode: waits for chunks. The answer is `Ready`, in parts, or `Ended`.

        `written` is true if the proxy has received the `ProxyNotif` of an LMCache sender for this request.
        """
        self.send(Await(req, keys, tokens, have_tokens, deadline_ms, written))

    def release(self, req: str, chunks: list[int], scatter_us: int = 0) -> None:
        """Decode: tells the sidecar that these chunks have been read."""
        self.send(Release(req, chunks, scatter_us))

    def abort(self, req: str) -> None:
        """Decode: tells the sidecar that the engine no longer wants the request."""
        self.send(Abort(req))

    def send(self, message: ToSidecar) -> None:
        """Sends any message.

        Raises `NotConnectedError`, or `WireError` for a message that is too long for a frame. If the connection ends
        during the call, the next `poll` returns `Lost`.
        """
        connection = self.connection
        try:
            connection.send(message)
        except ConnectionLostError:
            connection.shut()

    def poll(self) -> list[Event]:
        """Returns the events so far, without waiting."""
        events: list[Event] = []
        connection = self._connection
        if connection is not None:
            if self._reconnector.offers_another():
                events.append(self._drop("the sidecar closed the connection"))
            else:
                try:
                    events.extend(connection.poll())
                except (ConnectionLostError, WireError) as error:
                    connection.shut()
                    events.append(self._drop(str(error)))
        if self._connection is None and self._adopt():
            events.append(Connected(self.welcome))
        return events

    def wait(self, timeout_s: float) -> list[Event]:
        """Returns the events as `poll` does, but waits up to `timeout_s` for the first event."""
        if events := self.poll():
            return events
        wait_any([self], timeout_s)
        return self.poll()

    def settle(self) -> None:
        """Waits until the current attempt to connect has ended, for at most `SETTLE_S`. If an attempt takes longer than
        `SETTLE_S`, later calls do not wait for this attempt again.

        A sidecar is ready as soon as it has answered the greeting, and the proxy sends requests from then on. The
        thread that connects may receive this answer a moment after the first request. If the engine did not wait for
        the answer, it would compute the request without a transfer.
        """
        attempt = self._reconnector.attempts
        if self.connected or attempt == self._waited_for:
            return
        if not self._reconnector.settled.wait(SETTLE_S):
            self._waited_for = attempt

    def give_up(self, why: str) -> None:
        """Ends the connection, and opens a new connection that only tells the sidecar why this engine moves no KV.

        The sidecar then stays ready, and the proxy continues to use this engine.
        """
        self.close()
        self._reconnector = Reconnector(self.path, self._hello.as_unmoved(why), self._pauses, self._logger)
        self._reconnector.start()

    def close(self) -> None:
        """Ends the connection. The client does not connect again."""
        self._reconnector.stop()
        if self._connection is not None:
            self._connection.shut()
            self._connection = None

    def _adopt(self) -> bool:
        self._connection = self._reconnector.take()
        return self._connection is not None

    def _drop(self, why: str) -> Lost:
        self._connection = None
        return Lost(why)


def wait_any(clients: Iterable[Client], timeout_s: float) -> None:
    """Returns when one of the clients has something to poll, or after the timeout."""
    clients = list(clients)
    connections = [client.connection for client in clients if client.connected]
    if connections:
        wait_readable(connections, timeout_s)
    elif clients:
        clients[0]._reconnector.connected.wait(timeout_s)


__all__ = [
    "Abort",
    "Await",
    "Cancel",
    "Client",
    "Computing",
    "Connected",
    "Ended",
    "Granted",
    "Hello",
    "Lost",
    "NotConnectedError",
    "Pauses",
    "Ready",
    "Refused",
    "Release",
    "Reserve",
    "Staged",
    "Target",
    "Welcome",
    "default_socket",
    "wait_any",
]
