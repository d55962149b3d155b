"""Runs the proxy binary."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.client import HttpError, call, get_json
from harness.metrics import Metrics
from harness.ports import free_port
from harness.process import Part, Process
from harness.sidecar import BINARIES

START_BOUND_S = 60.0
RECORD_BOUND_S = 30.0


class Proxy(Part):
    """One proxy. The proxy keeps its ports when its process restarts."""

    def __init__(self, logs: Path, flags: list[str] | None = None) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.registration = f"127.0.0.1:{free_port()}"
        self._flags = flags or []
        self._logs = logs

    def start(self) -> None:
        """Starts the proxy and returns when it listens. Instances register afterwards."""
        command: list[str | Path] = [
            BINARIES / "pd-proxy", "--listen", self.url.removeprefix("http://"),
            "--registration", self.registration, *self._flags,
        ]  # fmt: skip
        self.process = Process("proxy", command, self._logs / "proxy.log")
        self._until("/health", START_BOUND_S)

    @contextlib.contextmanager
    def flags(self, *words: str) -> Iterator[None]:
        """Restarts the proxy with additional flags for the duration of the block."""
        before = self._flags
        self._flags = [*before, *words]
        self.restart()
        try:
            yield
        finally:
            self._flags = before
            self.restart()

    def add_flags(self, *words: str) -> None:
        """Adds flags that the proxy uses from its next start on."""
        self._flags = [*self._flags, *words]

    def set_flags(self, *words: str) -> None:
        """Sets the flags that the proxy uses from its next start on, in place of all other flags."""
        self._flags = list(words)

    def restart(self) -> None:
        self.stop()
        self.start()

    def wait_ready(self, bound_s: float = 60.0) -> None:
        """Returns when the proxy has a ready prefill instance and a ready decode instance."""
        self._until("/ready", bound_s)
        assert self.process is not None
        deadline = time.monotonic() + bound_s
        while not all(self._has_ready(role) for role in ("prefill", "decode")):
            if time.monotonic() > deadline:
                raise self.process.failure(f"instances not ready after {bound_s:g} s: {self.instances()}")
            time.sleep(0.05)

    def instances(self) -> list[dict[str, Any]]:
        instances: list[dict[str, Any]] = get_json(f"{self.url}/instances")
        return instances

    def records(self) -> list[dict[str, Any]]:
        """Returns the records of the last ended requests, oldest first.

        The proxy writes a record a moment after it has answered the client.
        """
        records: list[dict[str, Any]] = get_json(f"{self.url}/requests")
        return records

    def record(self, request_id: str, *, moved: bool = False) -> dict[str, Any]:
        """Returns the record of a request. With `moved`, waits until the record contains the sender's report."""
        return self._wait_for_records(lambda record: record["id"] == request_id, 1, moved)[0]

    @contextlib.contextmanager
    def recorded(self, count: int = 1, *, moved: bool = False) -> Iterator[list[dict[str, Any]]]:
        """Yields a list. At the end of the block the list gets the records of the requests that ended inside it."""
        seen = {record["id"] for record in self.records()}
        records: list[dict[str, Any]] = []
        yield records
        records += self._wait_for_records(lambda record: record["id"] not in seen, count, moved)

    def _wait_for_records(
        self, wanted: Callable[[dict[str, Any]], bool], count: int, moved: bool
    ) -> list[dict[str, Any]]:
        deadline = time.monotonic() + RECORD_BOUND_S
        while True:
            records = [record for record in self.records() if wanted(record)]
            complete = all(not moved or record["moved"] or record["alone"] for record in records)
            if len(records) >= count and complete:
                return records
            assert time.monotonic() < deadline, (
                f"waited for {count} records{' of moved KV' if moved else ''}: {records}"
            )
            time.sleep(0.02)

    def metrics(self) -> Metrics:
        return Metrics.scrape(f"{self.url}/metrics")

    def _has_ready(self, role: str) -> bool:
        return any(i["role"] in (role, "both") and i["standing"]["state"] == "ready" for i in self.instances())

    def _until(self, path: str, bound_s: float) -> None:
        assert self.process is not None
        deadline = time.monotonic() + bound_s
        while True:
            try:
                if call(f"{self.url}{path}", timeout_s=2.0)[0] == 200:
                    return
            except (OSError, HttpError):
                pass
            if not self.process.alive:
                raise self.process.failure(f"ended with exit code {self.process.exit_code}")
            if time.monotonic() > deadline:
                raise self.process.failure(f"{path} does not answer 200 after {bound_s:g} s")
            time.sleep(0.02)
