"""Collects the results of a run and writes them for people and for scripts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, round(0.99 * (len(values) - 1)))]


@dataclass(frozen=True)
class Row:
    """One comparison. The ratio should be at most `most` and at least `least`; None means that there is no bound."""

    what: str
    ours: str
    baseline: str
    ratio: float
    most: float | None = None
    least: float | None = None

    @property
    def holds(self) -> bool:
        return (self.most is None or self.ratio <= self.most) and (self.least is None or self.ratio >= self.least)

    @property
    def bound(self) -> str:
        if self.most is not None:
            return f"≤ {self.most:g}"
        return f"≥ {self.least:g}" if self.least is not None else ""


@dataclass
class Figures:
    """The results of a run. `flat` becomes target/bench.json, `rows` become the table in target/bench.md."""

    flat: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def table(self) -> str:
        lines = ["| | ours | baseline | ratio | target |", "|---|---|---|---|---|"]
        for row in self.rows:
            bound = row.bound + ("" if row.holds else " **missed**")
            lines.append(f"| {row.what} | {row.ours} | {row.baseline} | {row.ratio:.2f} | {bound} |")
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rounded = {key: round(value, 4) for key, value in sorted(self.flat.items())}
        (folder / "bench.json").write_text(json.dumps(rounded, indent=2) + "\n")
        (folder / "bench.md").write_text(self.table() + "\n")
