"""Measurements of single requests, and their summary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class Sample:
    """One request. All times are in seconds."""

    turn: int
    """The number of the turn, from 0."""

    start_s: float
    """Time since the begin of the run."""

    late_s: float = 0.0
    """Delay of the sending behind its planned time. A high value means that this program has too little CPU time."""

    first_s: float | None = None
    """Time until the first text of the answer."""

    total_s: float = 0.0
    """Time until the end of the answer."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    """The reason why the answer is missing or not complete; empty after a complete answer."""

    @property
    def per_token_s(self) -> float | None:
        """The mean time between two tokens of the answer; `None` if it has fewer than two."""
        if self.first_s is None or self.answer_tokens < 2:
            return None
        return (self.total_s - self.first_s) / (self.answer_tokens - 1)


@dataclass(frozen=True)
class Goals:
    """Limits that a good request keeps, in seconds; `None`: no limit."""

    first_s: float | None = None
    per_token_s: float | None = None

    def kept(self, sample: Sample) -> bool:
        if sample.error or sample.first_s is None:
            return False
        if self.first_s is not None and sample.first_s > self.first_s:
            return False
        per_token = sample.per_token_s
        return self.per_token_s is None or per_token is None or per_token <= self.per_token_s


@dataclass
class Result:
    """All that was measured at one server."""

    name: str
    url: str
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    """Time from the first request to the end of the last answer, of all rounds together."""

    unfinished: int = 0
    """Requests that were under way when the run was interrupted."""

    transfers: dict[str, float] = field(default_factory=dict)
    """Changes of the proxy's counters during the run; empty if the server is no pd-proxy."""

    def summary(self, goals: Goals) -> dict[str, Any]:
        """Returns the figures of the report. Times are in milliseconds; a figure without measurements is `None`."""
        good = [sample for sample in self.samples if not sample.error]
        kept = sum(goals.kept(sample) for sample in self.samples)
        seconds = self.seconds or 1e-9
        figures: dict[str, Any] = {
            "requests": len(self.samples),
            "failed": len(self.samples) - len(good),
            "unfinished": self.unfinished,
            "seconds": round(self.seconds, 3),
            "requests_per_s": round(len(good) / seconds, 3),
            "prompt_tokens": sum(sample.prompt_tokens for sample in good),
            "cached_tokens": sum(sample.cached_tokens for sample in good),
            "answer_tokens": sum(sample.answer_tokens for sample in good),
            "answer_tokens_per_s": round(sum(sample.answer_tokens for sample in good) / seconds, 3),
            "goals_kept": kept / len(self.samples) if self.samples else None,
            "good_requests_per_s": round(kept / seconds, 3),
            # Only first turns have a planned time.
            "late_ms": quantiles_ms([s for s in self.samples if s.turn == 0], lambda sample: sample.late_s),
            "first_ms": quantiles_ms(good, lambda sample: sample.first_s),
            "per_token_ms": quantiles_ms(good, lambda sample: sample.per_token_s),
            "total_ms": quantiles_ms(good, lambda sample: sample.total_s),
            "turns": [],
            "errors": {},
            "transfers": self.transfers,
        }
        for turn in sorted({sample.turn for sample in good}):
            of_turn = [sample for sample in good if sample.turn == turn]
            figures["turns"].append(
                {
                    "turn": turn + 1,
                    "requests": len(of_turn),
                    "first_ms": quantiles_ms(of_turn, lambda sample: sample.first_s),
                }
            )
        for sample in self.samples:
            if sample.error:
                figures["errors"][sample.error] = figures["errors"].get(sample.error, 0) + 1
        return figures


def quantile(values: Sequence[float], share: float) -> float:
    """Returns the value below or at which `share` of the sorted values are, with interpolation."""
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def quantiles_ms(samples: Sequence[Sample], of: Callable[[Sample], float | None]) -> dict[str, float] | None:
    """Returns mean and quantiles in milliseconds; `None` if no sample has the value."""
    values = sorted(value for sample in samples if (value := of(sample)) is not None)
    if not values:
        return None
    figures = {"mean": sum(values) / len(values)}
    figures |= {f"p{int(share * 100)}": quantile(values, share) for share in QUANTILES}
    return {name: round(value * 1000, 3) for name, value in figures.items()}
