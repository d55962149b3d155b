"""The thread that serves a worker's connections while the engine's own thread waits for the GPU."""

from __future__ import annotations

import os
import select
import threading
import time
from typing import TYPE_CHECKING, Protocol

from vllm.logger import init_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pd_sidecar.client import Client

logger = init_logger("vllm.pd_sidecar.worker.poller")


class PolledWorker(Protocol):
    """The worker, as the thread uses it. Its methods may be called from any thread."""

    def enter(self) -> None:
        """Prepares the calling thread for moves."""

    def read(self) -> bool:
        """Handles the messages of the sidecars. Returns true if there were any."""
        ...

    def move(self) -> bool:
        """Reads, and launches all moves that are possible. Returns true if it launched any."""
        ...

    def collect(self) -> bool:
        """Notes requests that are done. Returns true if the worker has any to report."""
        ...

    @property
    def is_moving(self) -> bool:
        """True while a move is under way and the worker has to watch for its end."""
        ...

    @property
    def lock(self) -> threading.RLock:
        """The lock that a thread holds while it moves."""
        ...

    @property
    def clients(self) -> Sequence[Client]:
        """The worker's connections."""
        ...


class Poller(threading.Thread):
    """Moves what can be moved as soon as a sidecar says so."""

    def __init__(self, worker: PolledWorker) -> None:
        super().__init__(name="pd-sidecar-pump", daemon=True)
        self._worker = worker
        self._news = threading.Event()
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wait(self, timeout_s: float) -> None:
        """For the engine's thread: returns when there is something to report, or after the time."""
        self._news.wait(timeout_s)
        self._news.clear()

    def wake(self) -> None:
        """There is a move whose end is to be watched for."""
        if threading.current_thread() is not self:
            os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Ends the thread, after the move that it is about to launch."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self.join(STOP_S)

    def run(self) -> None:
        try:
            self._worker.enter()
            while not self._stopping:
                self._sleep()
                # What has arrived is told first: a launch takes as long as the engine's next pause.
                self._worker.read()
                if self._worker.collect():
                    self._news.set()
                    time.sleep(YIELD_S)
                self._worker.move()
                if self._worker.collect():
                    self._news.set()
        except Exception:
            # The engine's thread moves in every step, too: it meets the same, and raises it there.
            logger.exception("KV is moved between the engine's steps only from now on")

    def _sleep(self) -> None:
        with self._worker.lock:
            # Kept here: a descriptor must not be closed, and given to another, while it is polled.
            connections = [c.connection for c in self._worker.clients if c.connected]
            moving = self._worker.is_moving
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        for connection in connections:
            poller.register(connection.fileno(), select.POLLIN)
        if any(fd == self._wake for fd, _ in poller.poll((MOVE_S if moving else LONGEST_S) * 1e3)):
            os.eventfd_read(self._wake)


MOVE_S = 1e-3
"""Between two looks at a move: the slots of a scatter are free so much later. The engine's thread,
which may be on its way to the step that uses it, takes turns with this one."""
YIELD_S = 50e-6
"""For the engine's thread to wake up in, before this one is busy launching."""
LONGEST_S = 0.05
"""Between two looks at connections that are being made."""
STOP_S = 1.0
"""For a thread that only launches."""
