"""Starts two sidecars without engines, and the driver program that uses their sockets as engines do."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.sidecar import BINARIES, Sidecar, SidecarOptions

EXAMPLES = BINARIES / "examples"
CHUNK_TOKENS = 256
PAUSE_US = 2000
"""The pause before each round, for the sidecars (see `engine_pair.rs`) and for the baseline.

Cores and caches are cold after a pause, so both must have the same pause.
"""


class Sidecars:
    """A sender and a receiver on this host."""

    def __init__(
        self,
        transport: str,
        buffer_bytes: int,
        folder: Path,
        logs: Path,
        env: dict[str, str],
        keys: dict[str, dict[str, object]],
    ) -> None:
        self.sender, self.receiver = (
            Sidecar(
                SidecarOptions(
                    role,
                    buffer_bytes,
                    transport=transport,
                    no_push=False,
                    env=env,
                    flags=["--log-level=warn"],
                    keys=keys.get(role, {}),
                ),
                folder,
                logs,
                name=f"bench-{role}-{transport}-{buffer_bytes >> 20}",
            )
            for role in ("sender", "receiver")
        )

    def push(self, *, chunk_bytes: int, chunks: int, rounds: int) -> tuple[list[float], list[dict[str, Any]]]:
        """Pushes `rounds` requests one after the other.

        Returns the microseconds from reservation to ready of each request, and the sender's records.
        """
        receiver = self.receiver
        done = subprocess.run(
            [
                EXAMPLES / "engine_pair", self.sender.socket, receiver.socket, receiver.host,
                str(receiver.init_port), str(receiver.alloc_port), str(chunk_bytes), str(chunks), str(rounds),
            ],
            check=True, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        times: list[float] = json.loads(done.stdout)
        records = self.sender.records()[-rounds:]
        assert all(r["reason"] is None and r["bytes"] == chunks * chunk_bytes for r in records), records
        return times, records


@contextlib.contextmanager
def sidecars(
    transport: str,
    buffer_bytes: int,
    folder: Path,
    logs: Path,
    env: dict[str, str] | None = None,
    keys: dict[str, dict[str, object]] | None = None,
) -> Iterator[Sidecars]:
    """Starts both. `keys` has the keys below `sidecar:` of each role."""
    pair = Sidecars(transport, buffer_bytes, folder, logs, env or {}, keys or {})
    try:
        pair.receiver.start()
        pair.sender.start()
        yield pair
    finally:
        pair.sender.stop()
        pair.receiver.stop()
