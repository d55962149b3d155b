"""Measures pd-proxy against vllm-router and sglang-router, in front of engines that answer at once.

The router has the first core for itself; the engines and the load generator share the second core. So the benchmark
compares only the work of the routers. vllm-router and pd-proxy get the same NIXL-style requests. sglang-router only
routes, and has no mode for such requests. So the comparison with sglang-router has no prefill instances.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harness.client import call
from harness.ports import free_port
from harness.process import Process
from harness.sidecar import BINARIES, ROOT

from bench.figures import Figures, Row, median

EXAMPLES = BINARIES / "examples"
ROUTERS = ROOT / "target" / "routers-venv"

ROUNDS = 7
SECONDS = "2.5"
CONNECTIONS = "32"
ROUTER_CORE, OTHER_CORE = "0", "1"

Sample = dict[str, float]


@dataclass
class Router:
    """One router, and its measurements by kind of request (`whole` or `stream`)."""

    name: str
    port: int
    process: Process
    cpu_us: dict[str, list[float]] = field(default_factory=dict)
    rps: dict[str, list[float]] = field(default_factory=dict)
    added: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def measure(figures: Figures, folder: Path, logs: Path) -> None:
    subprocess.run([ROOT / "scripts" / "routers.sh", ROUTERS], check=True)
    own = Figures()
    with _engines(logs) as (prefill, decode):
        with _routers(logs, prefill, decode) as routers:
            _compare(own, routers, prefill)
        with _plain_routers(logs, decode) as routers:
            _compare(own, routers, decode)
    figures.flat.update(own.flat)
    figures.rows += own.rows
    text = json.dumps({key: round(value, 4) for key, value in sorted(own.flat.items())}, indent=2)
    (ROOT / "target" / "proxy-bench.json").write_text(text + "\n")


def _compare(figures: Figures, routers: list[Router], engine: int) -> None:
    ours, theirs = routers
    legs = ["legs"] if theirs.name == "vllm_router" else []
    for kind, words in (("whole", []), ("stream", ["stream"])):
        for router in routers:
            _load(router.port, "1", *words)
        for _ in range(ROUNDS):
            for router in routers:
                before = router.process.cpu_seconds()
                sample = _load(router.port, SECONDS, *words)
                cpu = router.process.cpu_seconds() - before
                router.cpu_us.setdefault(kind, []).append(cpu * 1e6 / sample["requests"])
                router.rps.setdefault(kind, []).append(sample["requests"] / sample["seconds"])
        rate = f"rate={0.5 * min(median(router.rps[kind]) for router in routers):.0f}"
        for _ in range(ROUNDS):
            direct = _load(engine, SECONDS, rate, *legs, *words)
            for router in routers:
                through = _load(router.port, SECONDS, rate, *words)
                added = router.added.setdefault(kind, {"p50": [], "p99": []})
                for part, values in added.items():
                    values.append(through[f"{part}_us"] - direct[f"{part}_us"])
        _note(figures, ours, theirs, kind)


def _note(figures: Figures, ours: Router, theirs: Router, kind: str) -> None:
    suffix = "" if kind == "whole" else "_streamed"
    shown = theirs.name.replace("_", "-")
    # The targets against sglang-router are lower: with one leg, each router does half the work for a request.
    cpu, rps, added = (0.5, 2.0, 0.5) if theirs.name == "vllm_router" else (0.7, 1.2, 1.0)

    def row(key: str, what: str, mine: float, other: float, unit: str, **bound: float) -> None:
        # On a busy machine the requests without a router may take longer: nothing was measured, no target is met.
        ratio = mine / other if other > 0 else math.inf
        figures.flat[f"{key}_ratio_to_{theirs.name}{suffix}"] = ratio
        figures.flat[f"{key}_{unit}_beside_{theirs.name}{suffix}"] = mine
        figures.flat[f"{key}_{unit}_of_{theirs.name}{suffix}"] = other
        text = f"{what}, {kind}, against {shown}"
        figures.rows.append(Row(text, f"{mine:.0f}", f"{other:.0f}", ratio, **bound))

    row(
        "cpu_per_request", "CPU per request, µs", median(ours.cpu_us[kind]), median(theirs.cpu_us[kind]), "us", most=cpu
    )
    row("rps", "requests per second on one core", median(ours.rps[kind]), median(theirs.rps[kind]), "s", least=rps)
    for part in ("p50", "p99"):
        mine, other = (median(router.added[kind][part]) for router in (ours, theirs))
        row(f"added_latency_{part}", f"added latency at half load, {part}, µs", mine, other, "us", most=added)


def _load(port: int, seconds: str, *words: str) -> Sample:
    command = ["taskset", "-c", OTHER_CORE, EXAMPLES / "load", f"127.0.0.1:{port}", CONNECTIONS, seconds, *words]
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, timeout=60)
    sample: Sample = json.loads(done.stdout)
    assert sample["errors"] == 0, sample
    assert sample["requests"] > 0, sample
    return sample


@contextlib.contextmanager
def _engines(logs: Path) -> Iterator[tuple[int, int]]:
    ports = (free_port(), free_port())
    engines = [
        Process(
            f"engine {port}",
            ["taskset", "-c", OTHER_CORE, EXAMPLES / "scripted_engine", f"127.0.0.1:{port}"],
            logs / "scripted.log",
        )
        for port in ports
    ]
    try:
        for port in ports:
            _until(port, "/health")
        yield ports
    finally:
        for engine in engines:
            engine.stop()


@contextlib.contextmanager
def _routers(logs: Path, prefill: int, decode: int) -> Iterator[list[Router]]:
    """Starts both routers with a prefill and a decode instance. Neither router writes a log line per request."""
    urls = [f"http://127.0.0.1:{prefill}", f"http://127.0.0.1:{decode}"]
    port = free_port()
    vllm: list[str | Path] = [
        ROUTERS / "bin" / "vllm-router", "--host", "127.0.0.1", "--port", str(port), "--vllm-pd-disaggregation",
        "--kv-connector", "nixl", "--prefill", urls[0], "--decode", urls[1], "--policy", "round_robin",
        "--log-level", "warning", "--prometheus-port", str(free_port()),
    ]  # fmt: skip
    with _router("vllm_router", vllm, port, logs) as theirs:
        with _proxy(logs, ["--prefill", urls[0], "--decode", urls[1]]) as ours:
            yield [ours, theirs]


@contextlib.contextmanager
def _plain_routers(logs: Path, decode: int) -> Iterator[list[Router]]:
    url, port = f"http://127.0.0.1:{decode}", free_port()
    sglang: list[str | Path] = [
        ROUTERS / "bin" / "sglang-router", "launch", "--host", "127.0.0.1", "--port", str(port), "--worker-urls", url,
        "--policy", "round_robin", "--log-level", "warn", "--prometheus-port", str(free_port()),
    ]  # fmt: skip
    with _router("sglang_router", sglang, port, logs) as theirs:
        with _proxy(logs, ["--decode", url]) as ours:
            yield [ours, theirs]


@contextlib.contextmanager
def _proxy(logs: Path, flags: list[str]) -> Iterator[Router]:
    port = free_port()
    command: list[str | Path] = [
        BINARIES / "pd-proxy", "--listen", f"127.0.0.1:{port}", "--registration", f"127.0.0.1:{free_port()}",
        "--log", "warn", *flags,
    ]  # fmt: skip
    with _router("pd_proxy", command, port, logs) as router:
        yield router


@contextlib.contextmanager
def _router(name: str, command: list[str | Path], port: int, logs: Path) -> Iterator[Router]:
    process = Process(name, ["taskset", "-c", ROUTER_CORE, *command], logs / f"{name}.log", {"PYTHONUNBUFFERED": "1"})
    try:
        _until(port, "/v1/models", process)
        yield Router(name, port, process)
    finally:
        process.stop()


def _until(port: int, path: str, process: Process | None = None) -> None:
    deadline = time.monotonic() + 60.0
    while True:
        with contextlib.suppress(OSError):
            if call(f"http://127.0.0.1:{port}{path}", timeout_s=2.0)[0] == 200:
                return
        if process is not None and not process.alive:
            raise process.failure("ended")
        if time.monotonic() > deadline:
            raise TimeoutError(f"port {port} does not answer on {os.fspath(path)}")
        time.sleep(0.05)
