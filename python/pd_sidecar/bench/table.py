"""Writes the figures of a run as a table of text."""

from __future__ import annotations

from typing import Any

Figures = dict[str, Any]


def rows(figures: list[Figures]) -> list[tuple[str, list[str]]]:
    """Returns the rows of the table: a title, and the text for each server."""
    table = [
        ("requests: ended, failed, unfinished", [_counts(each) for each in figures]),
        ("requests per second", [f"{each['requests_per_s']:.2f}" for each in figures]),
        ("tokens: prompt, of these cached, answer", [_tokens(each) for each in figures]),
        ("answer tokens per second", [f"{each['answer_tokens_per_s']:.1f}" for each in figures]),
    ]
    for title, key in (
        ("time to first token", "first_ms"),
        ("time per further token", "per_token_ms"),
        ("time of whole answers", "total_ms"),
    ):
        table.append((f"{title}, ms: p50, p90, p99", [_times(each[key]) for each in figures]))
    turns = max((len(each["turns"]) for each in figures), default=0)
    for turn in range(turns if turns > 1 else 0):
        of_turn = [each["turns"][turn]["first_ms"] if turn < len(each["turns"]) else None for each in figures]
        table.append((f"turn {turn + 1}: time to first token, ms: p50, p90, p99", [_times(times) for times in of_turn]))
    table.append(("requests that kept the goals", [_share(each["goals_kept"]) for each in figures]))
    table.append(("such requests per second", [f"{each['good_requests_per_s']:.2f}" for each in figures]))
    if any(each["transfers"] for each in figures):
        table.append(("pd-proxy: requests with a transfer, without", [_transfers(each) for each in figures]))
        table.append(("pd-proxy: KV moved", [_moved(each) for each in figures]))
    table.append(("delay of this program, ms: p50, p90, p99", [_times(each["late_ms"]) for each in figures]))
    return table


def text(names: list[str], figures: list[Figures]) -> str:
    """Returns the table, and below it the errors."""
    table = [("", names), *rows(figures)]
    first = max(len(title) for title, _ in table)
    widths = [max(len(cells[column]) for _, cells in table) for column in range(len(names))]
    lines = [
        "  ".join([title.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for title, cells in table
    ]
    for name, each in zip(names, figures, strict=True):
        lines += [f"{name}: {count} times: {error}" for error, count in list(each["errors"].items())[:5]]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _counts(figures: Figures) -> str:
    return f"{figures['requests']}, {figures['failed']}, {figures['unfinished']}"


def _tokens(figures: Figures) -> str:
    return f"{figures['prompt_tokens']}, {figures['cached_tokens']}, {figures['answer_tokens']}"


def _times(times: dict[str, float] | None) -> str:
    return "-" if times is None else ", ".join(f"{times[name]:.1f}" for name in ("p50", "p90", "p99"))


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.1f} %"


def _transfers(figures: Figures) -> str:
    found = figures["transfers"]
    if not found:
        return "-"
    alone = {name.removeprefix("alone_"): n for name, n in found.items() if name.startswith("alone_")}
    reasons = f" ({', '.join(f'{reason} {n:g}' for reason, n in alone.items())})" if alone else ""
    return f"{found.get('transfers', 0):g}, {sum(alone.values()):g}{reasons}"


def _moved(figures: Figures) -> str:
    found = figures["transfers"]
    return f"{found.get('moved_bytes', 0) / 1e6:.1f} MB" if found else "-"
