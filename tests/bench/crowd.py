"""Sends 2,000 streams at once through pd-proxy for a minute. No stream may fail, and the memory must not grow.

The streams take all connections that the proxy allows to clients. 4,096 idle connections then take all of another
proxy's. Meanwhile each proxy has to answer health probes and scrapers.
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
STREAMS, IDLE = 2000, 4096
EVENTS, PACE_MS = "60", "1000"
PROBED = ("/health", "/ready", "/metrics")
PROBE_BOUND_MS = 100.0


def measure(figures: Figures, logs: Path) -> None:
    ports = [free_port() for _ in range(6)]
    urls = [f"http://127.0.0.1:{port}" for port in ports[:2]]
    engines = [
        Process(
            f"engine {port}", [EXAMPLES / "scripted_engine", f"127.0.0.1:{port}", EVENTS, PACE_MS], logs / "crowd.log"
        )
        for port in ports[:2]
    ]

    def proxy_of(listen: int, registration: int, connections: int) -> Process:
        command: list[str | Path] = [
            BINARIES / "pd-proxy", "--listen", f"127.0.0.1:{listen}", "--registration", f"127.0.0.1:{registration}",
            "--prefill", urls[0], "--decode", urls[1], "--max-in-flight", "4096",
            "--max-connections", str(connections), "--log", "warn",
        ]  # fmt: skip
        return Process("pd-proxy", command, logs / "crowd-proxy.log")

    proxies = [proxy_of(ports[2], ports[3], STREAMS), proxy_of(ports[4], ports[5], IDLE)]
    try:
        time.sleep(1.0)
        load = subprocess.Popen(
            [EXAMPLES / "load", f"127.0.0.1:{ports[2]}", str(STREAMS), "3", "stream"], stdout=subprocess.PIPE, text=True
        )
        # After 10 s all streams are open, and each has received some events.
        time.sleep(10.0)
        begin = _rss_mib(proxies[0].pid)
        busy_ms = _slowest_probe_ms(ports[2], 45.0)
        end = _rss_mib(proxies[0].pid)
        output, _ = load.communicate(timeout=60.0)
        sample = json.loads(output)
        assert (sample["errors"], sample["requests"]) == (0, STREAMS), sample
        with contextlib.ExitStack() as idle:
            for _ in range(IDLE):
                idle.enter_context(socket.create_connection(("127.0.0.1", ports[4])))
            idle_ms = _slowest_probe_ms(ports[4], 5.0)
    finally:
        for process in (*proxies, *engines):
            process.stop()
    figures.flat["streams_2000_rss_mib"] = end
    figures.flat["streams_2000_rss_growth_ratio"] = end / begin
    figures.rows.append(
        Row(f"{STREAMS} streams, MiB after 55 s, against 10 s", f"{end:.1f}", f"{begin:.1f}", end / begin, most=1.05)
    )
    for what, count, slowest_ms in (("streams", STREAMS, busy_ms), ("idle connections", IDLE, idle_ms)):
        figures.flat[f"slowest_probe_ms_beside_{count}_{what.replace(' ', '_')}"] = slowest_ms
        text = f"slowest probe beside {count} {what}, all that the proxy allows, ms, against the bound"
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
