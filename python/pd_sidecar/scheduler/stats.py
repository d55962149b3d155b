"""Counts what the connector does, through vLLM's own statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

COUNTERS = {
    "loads": "Requests whose KV was loaded.",
    "load_tokens": "Tokens whose KV was loaded.",
    "load_bytes": "Bytes of KV that were loaded.",
    "load_seconds": "Seconds that loaded requests were parked.",
    "copied_tokens": "Tokens whose KV was copied from another sequence of the same request (n > 1).",
    "scatter_seconds": "Seconds of copying from slots into pages.",
    "saves": "Requests whose KV was handed to the sidecar.",
    "save_tokens": "Tokens whose KV was handed to the sidecar.",
    "save_bytes": "Bytes of KV that were handed to the sidecar.",
    "layered_tokens": "Tokens whose KV was gathered layer by layer while it was computed.",
    "gather_seconds": "Seconds of copying from pages into slots.",
}
BY_REASON = {
    "load_failures": "Loads that failed; vLLM computes these requests.",
    "save_failures": "Saves that ended early.",
    "skipped": "Requests that are computed without transfer.",
}


class Stats(KVConnectorStats):
    """The sums since the last report. `data` has a number per counter, and a map for each counter that has reasons."""

    data: dict[str, Any]

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or {})

    def add(self, counter: str, value: float = 1) -> None:
        """Adds to one of `COUNTERS`."""
        self.data[counter] = self.data.get(counter, 0) + value

    def add_reason(self, counter: str, reason: str) -> None:
        """Adds one to one of `BY_REASON`."""
        reasons = self.data.setdefault(counter, {})
        reasons[reason] = reasons.get(reason, 0) + 1

    def take(self) -> Stats | None:
        """Returns the sums and resets them. Returns `None` if all sums are zero."""
        if self.is_empty():
            return None
        taken = Stats(self.data)
        self.data = {}
        return taken

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> Stats:
        for counter, value in other.data.items():
            if isinstance(value, Mapping):
                mine = self.data.setdefault(counter, {})
                for reason, count in value.items():
                    mine[reason] = mine.get(reason, 0) + count
            else:
                self.add(counter, value)
        return self

    def reduce(self) -> dict[str, int | float]:
        flat: dict[str, int | float] = {}
        for counter, value in self.data.items():
            if isinstance(value, Mapping):
                flat |= {f"{counter}_{reason}": count for reason, count in value.items()}
            else:
                flat[counter] = round(value, 6)
        return flat


class PromMetrics(KVConnectorPromMetrics):
    """The metrics `vllm:pd_sidecar_*`, per engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._labelvalues = per_engine_labelvalues
        self._plain = {
            name: counter(name=f"vllm:pd_sidecar_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        self._by_reason = {
            name: counter(
                name=f"vllm:pd_sidecar_{name}",
                documentation=text,
                labelnames=[*labelnames, "reason"],
            )
            for name, text in BY_REASON.items()
        }
        for values in per_engine_labelvalues.values():
            for metric in self._plain.values():
                metric.labels(*values)  # so that the metric exists from the start, with 0

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self._labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            if name in self._plain:
                self._plain[name].labels(*labels).inc(value)
            elif name in self._by_reason:
                for reason, count in value.items():
                    self._by_reason[name].labels(*labels, reason).inc(count)
