"""Writes the report of a run as one HTML file that needs no network."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from pd_sidecar.bench.charts import Series, chart
from pd_sidecar.bench.table import rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pd_sidecar.bench.samples import Result, Sample

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1340px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; border-bottom: 1px solid var(--line); }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums; } th { text-align: right; }
.run td { text-align: left; white-space: nowrap; } .run td + td { white-space: normal; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem; margin-top: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { font-size: 12px; fill: currentColor; } .grid { stroke: var(--line); }
.warning { border-left: 4px solid #d95f02; padding: .3rem .8rem; } code { overflow-wrap: anywhere; }
"""
BARS_S = 1.0
"""Width of a step in the chart of tokens per second."""


def report(
    title: str,
    about: dict[str, str],
    warnings: Sequence[str],
    results: Sequence[Result],
    figures: Sequence[dict[str, Any]],
) -> str:
    """Returns the page: what ran, warnings, the table, the charts and the errors."""
    names = [result.name for result in results]
    head = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in about.items())
    table = "".join(
        f"<tr><td>{escape(title)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for title, cells in rows(list(figures))
    )
    errors = "".join(
        f"<li>{escape(name)}: {count} times: <code>{escape(error)}</code></li>"
        for name, each in zip(names, figures, strict=True)
        for error, count in each["errors"].items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"</head><body><h1>{escape(title)}</h1>"
        + "".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings)
        + f"<table><tr><th></th>{''.join(f'<th>{escape(name)}</th>' for name in names)}</tr>{table}</table>"
        + f'<div class="charts">{"".join(charts(results, figures))}</div>'
        + (f"<h2>Errors</h2><ul>{errors}</ul>" if errors else "")
        + f'<h2>The run</h2><table class="run">{head}</table></body></html>\n'
    )


def charts(results: Sequence[Result], figures: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the charts: distributions, times over the run, tokens per second and, for conversations, turns."""
    drawn = [
        chart(
            "Time to first token: share of requests below", "ms", "% of requests",
            [_distribution(result, lambda sample: sample.first_s) for result in results], kind="steps",
        ),
        chart(
            "Time per further token: share of requests below", "ms", "% of requests",
            [_distribution(result, lambda sample: sample.per_token_s) for result in results], kind="steps",
        ),
        chart(
            "Time to first token over the run", "s since the begin", "ms",
            [Series(result.name, _over_time(result)) for result in results], kind="dots",
        ),
        chart(
            "Answer tokens per second", "s since the begin", "tokens per s",
            [Series(result.name, _throughput(result)) for result in results], kind="steps",
        ),
    ]  # fmt: skip
    if any(len(each["turns"]) > 1 for each in figures):
        turns = [
            Series(result.name, [(turn["turn"], turn["first_ms"]["p50"]) for turn in each["turns"] if turn["first_ms"]])
            for result, each in zip(results, figures, strict=True)
        ]
        drawn.append(chart("Time to first token by turn, median", "turn", "ms", turns))
    return drawn


def _distribution(result: Result, of: Callable[[Sample], float | None]) -> Series:
    values = sorted(value for sample in result.samples if not sample.error and (value := of(sample)) is not None)
    points = [(value * 1000, (index + 1) / len(values) * 100) for index, value in enumerate(values)]
    return Series(result.name, [(points[0][0], 0.0), *points] if points else [])


def _over_time(result: Result) -> list[tuple[float, float]]:
    good = [sample for sample in result.samples if sample.first_s is not None and not sample.error]
    return sorted((sample.start_s, (sample.first_s or 0.0) * 1000) for sample in good)


def _throughput(result: Result) -> list[tuple[float, float]]:
    """Returns the tokens of each second. The tokens of an answer are spread evenly between its first and its last."""
    buckets: dict[int, float] = {}
    for sample in result.samples:
        if sample.error or sample.first_s is None or not sample.answer_tokens:
            continue
        first, last = sample.start_s + sample.first_s, sample.start_s + sample.total_s
        spread = max(last - first, 1e-6)
        for bucket in range(int(first // BARS_S), int(last // BARS_S) + 1):
            inside = min(last, (bucket + 1) * BARS_S) - max(first, bucket * BARS_S)
            share = inside / spread if last - first > 1e-6 else float(bucket == int(first // BARS_S))
            buckets[bucket] = buckets.get(bucket, 0.0) + sample.answer_tokens * max(0.0, share)
    if not buckets:
        return []
    end = max(buckets) + 1
    return [(bucket * BARS_S, buckets.get(bucket, 0.0) / BARS_S) for bucket in range(end)] + [(end * BARS_S, 0.0)]
