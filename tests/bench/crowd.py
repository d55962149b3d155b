"""Sends 2,000 streams at once through pd-proxy for a minute. No stream may fail, and the memory must not grow.

The streams take all connections that the proxy allows to clients. Meanwhile, and while as many idle connections take
all of them, the proxy has to answer health probes and scrapers.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from pathlib import Path

from harness.client import call
from harness.ports import free_port
from harness.process import Process
from harness.sidecar import BINARIES

from bench.figures import Figures, Row

EXAMPLES = BINARIES / "examples"
STREAMS = 2000
EVENTS, PACE_MS = "60", "1000"
PROBED = ("/health", "/ready", "/metrics")
PROBE_BOUND_MS = 100.0


def measure(figures: Figures, logs: Path) -> None:
    ports = [free_port() for _ in range(4)]
    urls = [f"http://127.0.0.1:{port}" for port in ports[:2]]
    engines = [
        Process(
            f"engine {port}", [EXAMPLES / "scripted_engine", f"127.0.0.1:{port}", EVENTS, PACE_MS], logs / "crowd.log"
        )
        for port in ports[:2]
    ]
    command: list[str | Path] = [
        BINARIES / "pd-proxy", "--listen", f"127.0.0.1:{ports[2]}", "--registration", f"127.0.0.1:{ports[3]}",
        "--prefill", urls[0], "--decode", urls[1], "--max-in-flight", "4096", "--max-connections", str(STREAMS),
        "--log", "warn",
    ]  # fmt: skip
    proxy = Process("pd-proxy", command, logs / "crowd-proxy.log")
    try:
        time.sleep(1.0)
        load = subprocess.Popen(
            [EXAMPLES / "load", f"127.0.0.1:{ports[2]}", str(STREAMS), "3", "stream"], stdout=subprocess.PIPE, text=True
        )
        # After 10 s all streams are open, and each has received some events.
        time.sleep(10.0)
        begin = _rss_mib(proxy.pid)
        busy_ms = _slowest_probe_ms(ports[2], 45.0)
        end = _rss_mib(proxy.pid)
        output, _ = load.communicate(timeout=60.0)
        sample = json.loads(output)
        assert (sample["errors"], sample["requests"]) == (0, STREAMS), sample
        with contextlib.ExitStack() as idle:
            for _ in range(STREAMS):
                idle.enter_context(socket.create_connection(("127.0.0.1", ports[2])))
            idle_ms = _slowest_probe_ms(ports[2], 5.0)
    finally:
        for process in (proxy, *engines):
            process.stop()
    figures.flat["streams_2000_rss_mib"] = end
    figures.flat["streams_2000_rss_growth_ratio"] = end / begin
    figures.rows.append(
        Row(f"{STREAMS} streams, MiB after 55 s, against 10 s", f"{end:.1f}", f"{begin:.1f}", end / begin, most=1.05)
    )
    for what, slowest_ms in (("streams", busy_ms), ("idle connections", idle_ms)):
        figures.flat[f"slowest_probe_ms_beside_2000_{what.replace(' ', '_')}"] = slowest_ms
        text = f"slowest probe beside {STREAMS} {what} of at most {STREAMS}, ms, against the bound"
        bound = f"{PROBE_BOUND_MS:.0f}"
        figures.rows.append(Row(text, f"{slowest_ms:.0f}", bound, slowest_ms / PROBE_BOUND_MS, most=1.0))


def _slowest_probe_ms(port: int, seconds: float) -> float:
    slowest_ms = 0.0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for path in PROBED:
            begin = time.perf_counter()
            status, _ = call(f"http://127.0.0.1:{port}{path}", timeout_s=60.0)
            slowest_ms = max(slowest_ms, (time.perf_counter() - begin) * 1e3)
            assert status == 200, (path, status)
        time.sleep(0.2)
    return slowest_ms


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")
