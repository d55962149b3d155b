#!/usr/bin/env python3
"""Runs all benchmarks, or the named ones: `run.py [pushes] [protection] [handshakes] [engines] [ways] [proxies]
[crowd] [store]`.

Writes target/bench.json (flat) and target/bench.md (the table of docs/benchmarks.md).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
os.environ.setdefault("PD_BINARIES", str(TESTS.parent / "target" / "dist"))

from harness.process import ended_by_signals
from harness.progress import Progress
from harness.sidecar import ROOT

from bench import crowd, engines, handshakes, protection, proxies, pushes, store, ways
from bench.figures import Figures

LOGS = ROOT / "target" / "bench-logs"


def main() -> int:
    wanted = sys.argv[1:] or ["pushes", "protection", "handshakes", "engines", "ways", "proxies", "crowd", "store"]
    shutil.rmtree(LOGS, ignore_errors=True)
    figures, progress = Figures(), Progress()
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="pd-bench-") as folder:
        groups: list[tuple[str, str, Callable[[], None]]] = [
            ("pushes", "pushes of 64 and 512 MiB", lambda: pushes.measure(figures, Path(folder), LOGS)),
            (
                "protection",
                "pushes with plain, authenticated and sealed data",
                lambda: protection.measure(figures, Path(folder), LOGS),
            ),
            ("handshakes", "handshakes and single chunks", lambda: handshakes.measure(figures, Path(folder), LOGS)),
            ("engines", "four engines", lambda: engines.measure(figures, LOGS)),
            ("ways", "ways to hand a request over", lambda: ways.measure(figures, LOGS)),
            (
                "proxies",
                "routers in front of engines that answer at once",
                lambda: proxies.measure(figures, Path(folder), LOGS),
            ),
            ("crowd", "2,000 streams for a minute", lambda: crowd.measure(figures, LOGS)),
            ("store", "the store beside LMCache's server", lambda: store.measure(figures, Path(folder), LOGS)),
        ]
        for name, what, measure in groups:
            if name in wanted:
                progress.say(what)
                measure()
                # A run that is stopped, or that fails later, keeps the figures that it has.
                figures.write(ROOT / "target")
    print(figures.table())
    print(f"written: {ROOT / 'target' / 'bench.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
