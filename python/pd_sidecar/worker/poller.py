"""The thread that serves a worker's connections while the engine's own thread waits for the GPU."""

from __future__ import annotations

import os
import select
import threading
import time
from typing import TYPE_CHECKING, Protocol

import torch
from vllm.logger import init_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pd_sidecar.client import Client

logger = init_logger("vllm.pd_sidecar.worker.poller")


class PolledWorker(Protocol):
    """The interface of the worker that the thread uses. Any thread may call its methods."""

    def enter(self) -> None:
        """Prepares the calling thread for moves."""

    def read(self) -> bool:
        """Handles the messages of the sidecars. Returns true if there were any."""
        ...

    def move(self) -> bool:
        """Handles the messages of the sidecars, and launches all moves that are possible. Returns true if it launched
        any.
        """
        ...

    def collect(self) -> bool:
        """Records the requests that are done. Returns true if the worker has any to report."""
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
        """The connections to the sidecars."""
        ...


class Poller(threading.Thread):
    """Launches moves as soon as a sidecar's message allows them."""

    def __init__(self, worker: PolledWorker) -> None:
        super().__init__(name="pd-sidecar-poller", daemon=True)
        self._worker = worker
        self._news = threading.Event()
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wait(self, timeout_s: float) -> None:
        """Returns when there is something to report, or after the timeout. The engine's thread calls this method."""
        self._news.wait(timeout_s)
        self._news.clear()

    def wake(self) -> None:
        """Wakes the thread so that it watches for the end of a move."""
        if threading.current_thread() is not self:
            os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Ends the thread, after the move that it is about to launch."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self.join(STOP_S)

    def run(self) -> None:
        try:
            # The engine's thread makes tensors in this mode, and torch lets no thread outside the mode write to them.
            with torch.inference_mode():
                self._serve()
        except Exception:
            # The engine's thread also moves KV in every step. The engine's thread gets the same error and raises the
            # error.
            logger.exception(
                "the polling thread has failed: from now on only the engine's own thread moves KV, in its steps"
            )

    def _serve(self) -> None:
        self._worker.enter()
        while not self._stopping:
            self._sleep()
            # Report arrivals before the launch, because the launch can last until the engine's next pause and would
            # delay the report.
            self._worker.read()
            if self._worker.collect():
                self._news.set()
                time.sleep(YIELD_S)
            self._worker.move()
            if self._worker.collect():
                self._news.set()

    def _sleep(self) -> None:
        with self._worker.lock:
            # Keep the connections alive: a closed descriptor could be given to another file while this thread polls it.
            connections = [c.connection for c in self._worker.clients if c.connected]
            moving = self._worker.is_moving
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        for connection in connections:
            poller.register(connection.fileno(), select.POLLIN)
        if any(fd == self._wake for fd, _ in poller.poll((MOVE_S if moving else LONGEST_S) * 1e3)):
            os.eventfd_read(self._wake)


MOVE_S = 1e-3
"""Seconds between two checks for the end of a move. The slots of a scatter become free only when a check finds that the
scatter has ended. The checks must not be too frequent, because the engine's thread needs the same lock for the step
that uses the move.
"""
YIELD_S = 50e-6
"""Seconds that this thread sleeps between a report and a launch, so that the engine's thread can wake up first."""
LONGEST_S = 0.05
"""Seconds between two checks of connections that are not made yet."""
STOP_S = 1.0
"""Seconds that `stop` waits for a thread that is busy with a launch."""
