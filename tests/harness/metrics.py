"""Reads metrics in Prometheus' text format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from harness.client import HttpError, call

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Metrics:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self._samples: list[tuple[str, dict[str, str], float]] = []
        for line in text.splitlines():
            if match := _SAMPLE.match(line):
                name, labels, value = match.groups()
                self._samples.append((name, dict(_LABEL.findall(labels or "")), float(value)))

    @classmethod
    def scrape(cls, url: str) -> Self:
        status, text = call(url, timeout_s=30.0)
        if status != 200:
            raise HttpError(status, text)
        return cls(text)

    def sum(self, name: str, **labels: str) -> float:
        """Returns the sum of all samples with this name and these labels.

        The name of a counter may be given without its suffix `_total`.
        """
        names = (name, f"{name}_total")
        return sum(
            value
            for sample, own, value in self._samples
            if sample in names and all(own.get(key) == wanted for key, wanted in labels.items())
        )

    def by(self, name: str, label: str) -> dict[str, float]:
        """Returns the sum of the samples for each value of one label, except sums of zero."""
        values: dict[str, float] = {}
        for sample, own, value in self._samples:
            if sample in (name, f"{name}_total") and value:
                values[own.get(label, "")] = values.get(own.get(label, ""), 0.0) + value
        return values


@dataclass(frozen=True)
class PromptTokens:
    """The engine's own counts of prompt tokens, by the source of their KV.

    `external` tokens came through the connector, and `cached` tokens came from the engine's prefix cache. The engine
    computed the `computed` tokens itself.
    """

    external: int
    cached: int
    computed: int

    @classmethod
    def of(cls, metrics: Metrics) -> PromptTokens:
        by_source = metrics.by("vllm:prompt_tokens_by_source", "source")
        return cls(
            external=int(by_source.get("external_kv_transfer", 0)),
            cached=int(by_source.get("local_cache_hit", 0)),
            computed=int(by_source.get("local_compute", 0)),
        )

    def __sub__(self, before: PromptTokens) -> PromptTokens:
        return PromptTokens(
            self.external - before.external, self.cached - before.cached, self.computed - before.computed
        )
