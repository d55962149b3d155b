"""Runs the store's binary."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from harness.metrics import Metrics
from harness.ports import free_port
from harness.process import Part, Process
from harness.sidecar import BINARIES

READY_BOUND_S = 60.0


class Store(Part):
    """One store. It keeps its ports and its folder when its process restarts."""

    def __init__(self, logs: Path, *flags: str | Path) -> None:
        self.port = free_port()
        self.admin = f"127.0.0.1:{free_port()}"
        self._flags = flags
        self._logs = logs

    def start(self) -> None:
        """Starts the store and returns when it answers."""
        listen = f"127.0.0.1:{self.port}"
        command: list[str | Path] = [
            BINARIES / "pd-store", "--listen", listen, "--admin", self.admin, *self._flags,
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
        return Metrics.scrape(f"http://{self.admin}/metrics")


def below(kv_transfer: dict[str, Any], store: Store, timeout_s: float = 1.0) -> dict[str, Any]:
    """Returns an engine's connectors: the given one, and vLLM's OffloadingConnector with a store below it.

    The engine needs `python` and `tests` in its PYTHONPATH. Every request loads, even if computing would be faster.
    """
    tier = {
        "type": "StoreTier", "module_path": "pd_sidecar.store.tier",
        "url": f"lm://127.0.0.1:{store.port}", "timeout_s": timeout_s, "load": "always",
    }  # fmt: skip
    offloading = {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "HostTieringSpec", "spec_module_path": "harness.host_offload",
            "cpu_bytes_to_use": 1 << 28, "offload_prompt_only": False, "secondary_tiers": [tier],
        },
    }  # fmt: skip
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [kv_transfer, offloading]},
    }
