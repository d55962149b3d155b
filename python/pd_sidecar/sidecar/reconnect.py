"""Keeps a client connected, in a thread of its own."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pd_sidecar.sidecar.connection import Connection, RefusedError
from pd_sidecar.sidecar.wire import WireError

if TYPE_CHECKING:
    import logging

    from pd_sidecar.sidecar.wire import Hello


@dataclass(frozen=True)
class Pauses:
    """Seconds between attempts to connect."""

    first: float = 0.05
    longest: float = 2.0
    refused: float = 15.0
    """The pause after a refusal. The sidecar refuses again until one of the two sides or its configuration changes."""
    greeting: float = 30.0
    """Maximum wait for the answer to the greeting. A new sidecar may first touch every page of its buffer."""


class Reconnector(threading.Thread):
    """Connects, watches for the end of the connection, and connects again."""

    def __init__(self, path: str, hello: Hello, pauses: Pauses, logger: logging.Logger) -> None:
        super().__init__(name="pd-sidecar-link", daemon=True)
        self.connected = threading.Event()
        self.settled = threading.Event()
        """Not set while an attempt to connect is under way."""
        self.attempts = 0
        """The number of attempts to connect so far."""
        self.failure = ""
        self._path = path
        self._hello = hello
        self._pauses = pauses
        self._logger = logger
        self._lock = threading.Lock()
        self._offered: Connection | None = None
        self._stand_in: Connection | None = None
        """A connection that is open while engine and sidecar cannot work together. The greeting on this connection
        tells the sidecar why no KV is moved.
        """
        self._stopping = threading.Event()
        # `stop` closes one end of this pair, which wakes the thread from every wait.
        self._wake_read, self._wake_write = socket.socketpair()

    def take(self) -> Connection | None:
        """Returns the newest connection; `None` if an earlier call has returned it already."""
        with self._lock:
            connection, self._offered = self._offered, None
            self.connected.clear()
        return connection

    def offers_another(self) -> bool:
        """Returns true if there is a newer connection than the one that `take` returned last."""
        return self._offered is not None

    def stop(self) -> None:
        """Ends the thread. Does not wait for a greeting under way."""
        self._stopping.set()
        self._wake_write.close()

    def run(self) -> None:
        pause = self._pauses.first
        while not self._stopping.is_set():
            self.attempts += 1
            self.settled.clear()
            connection, retry_s = self._connect(pause)
            if connection is None:
                self.settled.set()
                pause = min(pause * 2, self._pauses.longest)
                self._sleep(retry_s)
                continue
            pause = self._pauses.first
            self._stand_in = None
            if not self._hello.unmoved:
                # If an engine moves no KV, its connection only stays open: no message follows the greeting.
                with self._lock:
                    self._offered = connection
                    self.connected.set()
            self.settled.set()
            self._watch(connection)
            with self._lock:
                if self._offered is connection:
                    self._offered = None
                    self.connected.clear()
            del connection
        self._wake_read.close()

    def _connect(self, pause: float) -> tuple[Connection | None, float]:
        """Returns a connection, or the seconds to wait before the next attempt."""
        try:
            connection = Connection.open(self._path, self._hello, self._pauses.greeting)
        except RefusedError as error:
            self._say(f"refused by the sidecar at {self._path}: {error}")
            self._stand_in_for(f"its sidecar refuses this engine: {error}")
            return None, self._pauses.refused
        except WireError as error:
            self._say(f"no sidecar at {self._path}: {error}")
            self._stand_in_for(f"it cannot use its sidecar: {error}")
            return None, pause if self._stand_in is None else self._pauses.refused
        except (OSError, ValueError) as error:
            self._say(f"no sidecar at {self._path}: {error}")
            self._stand_in = None
            return None, pause
        welcome = connection.welcome
        self.failure = ""
        self._logger.info(
            "connected to sidecar %s at %s: epoch %x, %d slots of %d bytes",
            welcome.id,
            self._path,
            welcome.epoch,
            welcome.slots,
            welcome.slot_bytes,
        )
        return connection, 0.0

    def _stand_in_for(self, why: str) -> None:
        """Keeps the sidecar ready while nothing is moved, so that the proxy continues to use this engine."""
        if self._stand_in is not None or self._hello.unmoved:
            return
        hello = self._hello.as_unmoved(why)
        # A sidecar refuses this greeting if it is too old to know such greetings, or if it does not have this rank.
        with contextlib.suppress(RefusedError, WireError, OSError, ValueError):
            self._stand_in = Connection.open(self._path, hello, self._pauses.greeting)

    def _say(self, failure: str) -> None:
        """Logs a failure only if it differs from the previous failure."""
        if failure != self.failure:
            self.failure = failure
            self._logger.warning("%s; requests are computed without transfer until this ends", failure)

    def _watch(self, connection: Connection) -> None:
        """Returns when the connection has ended. Does not read from the connection."""
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLRDHUP)
        poller.register(self._wake_read, select.POLLIN)
        poller.poll()

    def _sleep(self, seconds: float) -> None:
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        stand_in = self._stand_in
        if stand_in is not None:
            poller.register(stand_in.fileno(), select.POLLRDHUP)
        woken = [fd for fd, _ in poller.poll(seconds * 1000)]
        if stand_in is not None and stand_in.fileno() in woken:
            # The sidecar has ended. A new sidecar may accept this engine.
            self._stand_in = None
