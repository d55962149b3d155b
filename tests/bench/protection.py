"""Measures pushes over the built-in TCP transport with plain, authenticated and sealed data."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path

from harness.sidecar import BINARIES

from bench.figures import Figures, Row, median
from bench.sidecars import Sidecars, sidecars

MIB = 1 << 20

# Number of turns, and number of rounds per turn of each pair. Other work on the machine changes slowly, so each ratio
# compares the rounds of one turn.
TURNS = 8
ROUNDS = 6

LEAST = {"plain": 0.0, "authenticated": 0.9, "sealed": 0.8}


def measure(figures: Figures, folder: Path, logs: Path) -> None:
    for total, chunk in ((64, 1), (256, 16)):
        with ExitStack() as stack:
            pairs = {}
            for data in LEAST:
                own = folder / f"{data}-{total}"
                own.mkdir()
                pair = sidecars("tcp", total * MIB, own, logs, keys=_keys(own, data))
                pairs[data] = stack.enter_context(pair)
            rates = _rates(pairs, total, chunk)
        for data in ("authenticated", "sealed"):
            ratio = median([ours / plain for ours, plain in zip(rates[data], rates["plain"], strict=True)])
            figures.flat[f"push_tcp_{data}_ratio_to_plain_{total}mib"] = ratio
            figures.flat[f"push_tcp_{data}_{total}mib_gb_per_s"] = median(rates[data])
            figures.rows.append(
                Row(
                    f"push over the built-in TCP, {total} MiB in chunks of {chunk} MiB, data: {data} against plain",
                    f"{median(rates[data]):.1f} GB/s",
                    f"{median(rates['plain']):.1f} GB/s",
                    ratio,
                    least=LEAST[data],
                )
            )


def _rates(pairs: dict[str, Sidecars], total: int, chunk: int) -> dict[str, list[float]]:
    """Returns the median GB/s of each turn, for each protection."""
    push = {"chunk_bytes": chunk * MIB, "chunks": total // chunk}
    rates: dict[str, list[float]] = {data: [] for data in pairs}
    for turn in range(-1, TURNS):
        for data, pair in pairs.items():
            _, records = pair.push(**push, rounds=ROUNDS)
            # The first turn makes the links.
            if turn >= 0:
                rates[data].append(median([record["bytes"] / record["push_us"] / 1e3 for record in records]))
    return rates


def _keys(own: Path, data: str) -> dict[str, dict[str, object]]:
    """Makes a key for each role, and returns the configuration of each."""
    entries = {}
    settings: dict[str, dict[str, object]] = {}
    for role in ("sender", "receiver"):
        command: list[str | Path] = [BINARIES / "sidecar", "keygen", own / f"{role}.key"]
        public = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        entries[public] = {"name": role, "roles": [role]}
        settings[role] = {
            "id": role,
            "auth": "require",
            "key_file": str(own / f"{role}.key"),
            "roster": str(own / "roster.yaml"),
            "data": data,
        }
    (own / "roster.yaml").write_text(json.dumps(entries))
    return settings
