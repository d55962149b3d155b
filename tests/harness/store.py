"""Runs the store's binary."""

from __future__ import annotations

import time
from pathlib import Path

from harness.metrics import Metrics
from harness.ports import free_port
from harness.process import Part, Process
from harness.sidecar import BINARIES

READY_BOUND_S = 60.0


class Store(Part):
    """One store. It keeps its ports and its folder when its process restarts."""

    def __init__(self, logs: Path, *flags: str | Path) -> None:
        self.port = free_port()
        self._admin = f"127.0.0.1:{free_port()}"
        self._flags = flags
        self._logs = logs

    def start(self) -> None:
        """Starts the store and returns when it answers."""
        listen = f"127.0.0.1:{self.port}"
        command: list[str | Path] = [
            BINARIES / "pd-store", "--listen", listen, "--admin", self._admin, *self._flags,
        ]  # fmt: skip
        self.process = Process("store", command, self._logs / "store.log")
        deadline = time.monotonic() + READY_BOUND_S
        while True:
            try:
                self.metrics()
            except OSError:
                if not self.process.alive or time.monotonic() > deadline:
                    raise self.process.failure("did not start") from None
                time.sleep(0.05)
            else:
                return

    def metrics(self) -> Metrics:
        """Returns the values of all metrics."""
        return Metrics.scrape(f"http://{self._admin}/metrics")
