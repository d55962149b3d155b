"""Measures the store beside LMCache's own server of the `lm://` protocol, with the same load generator."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.drop_in.forked import LMCACHE_PYTHON
from harness.ports import free_port
from harness.process import Process
from harness.sidecar import BINARIES
from harness.store import Store

from bench.figures import Figures, Row, median

MIB = 1 << 20
TURNS = 5

# Clients, values per client, and bytes of a value. LMCache's server keeps everything, so the sum is small.
LOADS = ((1, 24, 4 * MIB), (8, 12, MIB), (16, 6, 4 * MIB))


def measure(figures: Figures, folder: Path, logs: Path) -> None:
    for clients, values, size in LOADS:
        found: dict[str, list[dict[str, float]]] = {"ours": [], "lmcache": []}
        for turn in range(TURNS):
            for name, run in (("ours", _ours), ("lmcache", _lmcache)):
                with run(folder, logs) as (port, process):
                    before = process.cpu_seconds()
                    result = _load(port, clients, values, size)
                    result["cpu_s_per_gib"] = (process.cpu_seconds() - before) / (result["bytes"] / 2**30)
                # The first turn fills the caches of the machine.
                if turn:
                    found[name].append(result)
        _report(figures, found, clients, size // MIB)


def _report(figures: Figures, found: dict[str, list[dict[str, float]]], clients: int, mib: int) -> None:
    for what, key, unit, scale, most, least in (
        ("PUT", "put_bytes_per_s", "GB/s", 1e-9, None, 2.0),
        ("GET", "get_bytes_per_s", "GB/s", 1e-9, None, 2.0),
        ("p99 of GET", "get_p99_s", "ms", 1e3, 0.5, None),
        ("CPU", "cpu_s_per_gib", "s/GiB", 1.0, 0.5, None),
    ):
        ours, theirs = ([run[key] for run in found[name]] for name in ("ours", "lmcache"))
        ratio = median([mine / other for mine, other in zip(ours, theirs, strict=True)])
        figures.flat[f"store_{key}_{clients}_clients_ratio"] = ratio
        figures.rows.append(
            Row(
                f"store: {what}, {clients} clients, values of {mib} MiB, against LMCache's server",
                f"{median(ours) * scale:.2f} {unit}",
                f"{median(theirs) * scale:.2f} {unit}",
                ratio,
                most=most,
                least=least,
            )
        )


def _load(port: int, clients: int, values: int, size: int) -> dict[str, Any]:
    program = BINARIES / "examples" / "store_load"
    command: list[str | Path] = [program, f"127.0.0.1:{port}", str(clients), str(values), str(size)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return dict(json.loads(run.stdout))


@contextmanager
def _ours(folder: Path, logs: Path) -> Iterator[tuple[int, Process]]:
    store = Store(logs, "--memory", "1GiB")
    store.start()
    try:
        assert store.process is not None
        yield store.port, store.process
    finally:
        store.stop()


@contextmanager
def _lmcache(folder: Path, logs: Path) -> Iterator[tuple[int, Process]]:
    port = free_port()
    command: list[str | Path] = [LMCACHE_PYTHON, "-m", "lmcache.v1.server", "127.0.0.1", str(port)]
    process = Process("lmcache-server", command, logs / "lmcache-server.log")
    deadline = time.monotonic() + 60
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1.0).close()
            except OSError:
                if not process.alive or time.monotonic() > deadline:
                    raise process.failure("did not start") from None
                time.sleep(0.1)
            else:
                break
        yield port, process
    finally:
        process.kill()
