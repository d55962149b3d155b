"""Writes the results as JSON, and as the table for docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

BASELINES = ("nixl", "lmcache")
TITLES = {
    "plain": "one instance",
    "ours": "ours",
    "ours, first of prefill": "ours, `--first-token prefill`",
    "ours-step": "ours, `push: step`",
    "ours-auto": "ours, `push: auto`",
    "ours by router": "ours, driven as by a router",
    "nixl": "NixlConnector",
    "lmcache": "LMCache PD",
}


def write(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu-bench.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "gpu-bench.md").write_text(table(result) + "\n")


def table(result: dict[str, Any]) -> str:
    """Returns the results measured so far as Markdown."""
    lines = [
        f"{result['date']}, {'; '.join(result['hardware'])}, "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + f"; `{result['command']}`",
        "",
    ]
    for name, part in PARTS.items():
        found = result.get(name)
        if found and "failure" not in found:
            lines += [f"**{name}**", "", *part(found), ""]
    for name in ("throughput", "many", "wires", "moved", "left_out"):
        if result.get(name):
            lines += [f"**{name}**: `{json.dumps(result[name])[:1500]}`", ""]
    return "\n".join(lines)


def _first_of_prefill(found: dict[str, Any]) -> list[str]:
    """Returns rows with the time to the first token and the time from the first to the second token.

    If the prefill side gives the first token, the hand-over happens between the first and the second token. The gap is
    the time between these two tokens, minus the same time of a single instance.
    """
    stacks = list(found)
    lines = ["| prompt | " + " | ".join(f"{TITLES[name]}: first token, then second" for name in stacks) + " | gap |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for tokens in found[stacks[0]]:
        row = [found[name][tokens] for name in stacks]
        second = [of["second_after_first_ms_median"] for of in row]
        cells = [f"{of['first_ms_median']:.1f} + {after:.1f} ms" for of, after in zip(row, second, strict=True)]
        lines.append(f"| {tokens} | " + " | ".join(cells) + f" | {second[-1] - second[0]:.1f} ms |")
    return lines


def _tpot(found: dict[str, Any]) -> list[str]:
    """Returns rows with the times between tokens."""
    lines = [
        "| | nothing arrives, p50 / p99 | hand-overs arrive, p50 / p99 | hand-overs | failed |",
        "|---|---|---|---|---|",
    ]
    for name, of in found.items():
        cells = [
            f"{of[when]['per_token_ms_p50']:.2f} / {of[when]['per_token_ms_p99']:.2f} ms" for when in ("idle", "busy")
        ]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} | {of['busy']['handovers']} | {of['failed']} |")
    ratios = [found.get("ours", {}).get(f"per_token_ms_{share}_ratio") for share in ("p50", "p99")]
    return [*lines, "", f"Ours over the better baseline while hand-overs arrive, p50 and p99: {ratios[0]}, {ratios[1]}"]


def _latency(found: dict[str, Any]) -> list[str]:
    """Returns rows with the time to the first token and the gap, which is this time minus the same time of a single
    instance.
    """
    stacks = list(found)
    lines = ["| prompt | " + " | ".join(f"{TITLES[name]}: first token" for name in stacks) + " | "]
    lines[0] += " | ".join(f"gap {TITLES[name]}" for name in stacks if name != "plain") + " | texts equal |"
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for tokens in found[stacks[0]]:
        row = {name: found[name][tokens] for name in stacks}
        cells = [f"{row[name]['first_ms_median']:.1f} ms" for name in stacks]
        if "plain" in row:
            alone = row["plain"]["first_ms_median"]
            cells += [f"{row[name]['first_ms_median'] - alone:.1f} ms" for name in stacks if name != "plain"]
        cells.append(", ".join(f"{row[name]['texts_as_first_stack']}/{row[name]['requests']}" for name in stacks))
        lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    return lines


def _load(found: dict[str, Any]) -> list[str]:
    lines = ["| | done | first token p50 / p99 | gap p50 / p99 | per output token p50 / p99 |", "|---|---|---|---|---|"]
    for name, of in found.items():
        gap = f"{of['gap_ms_p50']:.0f} / {of['gap_ms_p99']:.0f} ms" if "gap_ms_p50" in of else ""
        lines.append(
            f"| {TITLES[name]} | {of['done']} of {of['done'] + of['failed']} | "
            f"{of['first_ms_p50']:.0f} / {of['first_ms_p99']:.0f} ms | {gap} | "
            f"{of['per_token_ms_p50']:.1f} / {of['per_token_ms_p99']:.1f} ms |"
        )
    return lines


PARTS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "latency": _latency,
    "first_of_prefill": _first_of_prefill,
    "tpot": _tpot,
    "poisson": _load,
    "burst": _load,
}
