#!/usr/bin/env python3
"""Measures the contract of vLLM's NixlConnector: this project beside NixlConnector itself: `contract.py [CELL ..]`.

Writes target/contract.md. A cell is the name of a function below; without names all cells are measured.

Each side has two engines of one host that get the same settings and one router, vllm-router. The sides run one after
the other, because each of NixlConnector's workers uses a whole core even when it is idle.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))
os.environ.setdefault("PD_BINARIES", str(TESTS.parent / "target" / "dist"))

from harness.client import HttpError, complete
from harness.engine import Engine, EngineOptions, wait_for
from harness.model import write_model
from harness.ports import free_port
from harness.process import ended_by_signals, group_members
from harness.progress import Progress
from harness.prompts import prompt
from harness.routers import install, prefill_leg, running_vllm_router
from harness.sidecar import BINARIES, ROOT

from bench.figures import median

LOGS = ROOT / "target" / "bench-logs"
ANSWER = 8
SHORT, LONG = 300, 1500
ROUNDS = 8
ABANDONED = int(os.environ.get("PD_CONTRACT_ABANDONED", "1000"))
# NixlConnector's lease and our `keep_ms` are both 30 s by default.
LEASE_S = 30.0
LONGEST_S = 90.0
IDLE_AFTER_S, IDLE_S = 15.0, 10.0
# The Python of an environment with another version of vLLM, for the cell `other_version`.
OTHER_PYTHON = os.environ.get("PD_CONTRACT_OTHER_PYTHON", "")
CLIENTS = 4


@dataclass
class Side:
    """Two engines with one connector, and the cells that were measured."""

    name: str
    transfer: dict[str, Any]
    env: dict[str, str]
    model: Path
    cells: dict[str, str] = field(default_factory=dict)
    seed: int = 3000

    def __post_init__(self) -> None:
        self.prefill, self.decode = (
            Engine(
                EngineOptions(
                    f"{self.name} {role}", self.model, kv_transfer=self.transfer, core=core,
                    env={**self.env, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())},
                    more=("--kv-cache-memory-bytes", str(256 << 20), "--shutdown-timeout", "60"),
                ),
                LOGS,
            )
            for core, role in enumerate(("prefill", "decode"))
        )  # fmt: skip

    def prompt(self, tokens: int) -> list[int]:
        self.seed += 1
        return prompt(tokens, seed=self.seed)

    def hand_over(self, url: str, tokens: list[int], told: dict[str, object] | None = None) -> tuple[float, str]:
        """Sends a decode leg, or a whole request to a router. Returns the seconds until the first token, and what the
        client and the decode engine saw.
        """
        more: dict[str, Any] = {} if told is None else {"kv_transfer_params": told}
        before = self.decode.prompt_tokens()
        began = time.perf_counter()
        try:
            answer = complete(url, tokens, max_tokens=ANSWER, model="m", timeout_s=LONGEST_S, **more)
        except (HttpError, OSError, RuntimeError) as error:
            what = f"HTTP {error.status}" if isinstance(error, HttpError) else type(error).__name__
            return time.perf_counter() - began, f"{what} for the client"
        spent = (self.decode.prompt_tokens() - before).external
        self.decode.reset_prefix_cache()
        if answer.token_ids != complete(self.decode.url, tokens, max_tokens=ANSWER).token_ids:
            return answer.first_s or 0.0, "a WRONG text"
        self.decode.reset_prefix_cache()
        return answer.first_s or 0.0, f"right text, {spent} of {len(tokens)} prompt tokens handed over"

    def until_free(self) -> float | None:
        """Returns the seconds until the prefill engine holds no KV; `None` if it still does after the longest wait."""
        began = time.monotonic()
        while time.monotonic() < began + LONGEST_S:
            # An idle engine updates its metrics only with a step.
            complete(self.prefill.url, [5, 6, 7], max_tokens=1)
            if self.prefill.cache_usage() == 0:
                return time.monotonic() - began
            time.sleep(0.5)
        return None


def measure(side: Side, programs: Path, progress: Progress) -> None:
    with contextlib.ExitStack() as stack:
        engines = (side.prefill, side.decode)
        for engine in engines:
            stack.callback(engine.kill)
            engine.start()
        wait_for(engines, progress)
        for cell in CELLS:
            if sys.argv[1:] and cell.__name__ not in sys.argv[1:]:
                continue
            progress.say(f"{side.name}: {cell.__name__}")
            try:
                cell(side, programs)
            except (AssertionError, HttpError, OSError, RuntimeError, subprocess.TimeoutExpired) as error:
                # A cell is measured or left out.
                progress.say(f"{side.name}: {cell.__name__} is left out: {error!r}")


def first_and_later(side: Side, programs: Path) -> None:
    with running_vllm_router(programs, side.prefill, side.decode, LOGS) as url:
        took, what = side.hand_over(url, side.prompt(SHORT))
        side.cells[f"first hand-over between a pair, {SHORT} tokens"] = f"{took:.3f} s, {what}"
        times, last = [], ""
        for _ in range(ROUNDS):
            took, last = side.hand_over(url, side.prompt(LONG))
            times.append(took)
        side.cells[f"time to first token behind vllm-router, {LONG} tokens, median of {ROUNDS}"] = (
            f"{median(times):.3f} s ({min(times):.3f} to {max(times):.3f}), {last}"
        )


def left_between_the_legs(side: Side, _: Path) -> None:
    tokens = side.prompt(SHORT)
    told = prefill_leg(side.prefill, tokens)
    began = time.monotonic()
    side.cells["client gone between the legs: the prefill engine holds the KV for"] = seconds(side.until_free())
    time.sleep(max(0.0, began + LEASE_S + 5 - time.monotonic()))
    took, what = side.hand_over(side.decode.url, tokens, told)
    side.cells["decode leg 5 s after the lease"] = f"{took:.3f} s, {what}"


def abandoned(side: Side, _: Path) -> None:
    prompts = [side.prompt(SHORT) for _ in range(ABANDONED)]
    peak, began = 0.0, time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        legs = [pool.submit(prefill_leg, side.prefill, tokens) for tokens in prompts]
        while not all(leg.done() for leg in legs):
            peak = max(peak, side.prefill.cache_usage())
            time.sleep(0.2)
            if time.monotonic() > began + 2 * LONGEST_S:
                break
        took, done = time.monotonic() - began, sum(leg.done() for leg in legs)
        for leg in legs:
            leg.cancel()
    key = f"{ABANDONED} prefill legs of {SHORT} tokens without a decode leg"
    held = f"at most {100 * peak:.0f} % of the cache held"
    side.cells[key] = f"{done} answered in {took:.0f} s, {held}, free {seconds(side.until_free())} later"


def restarted(side: Side, programs: Path) -> None:
    restart(side.prefill, side.prefill.options)
    with running_vllm_router(programs, side.prefill, side.decode, LOGS) as url:
        took, what = side.hand_over(url, side.prompt(SHORT))
    side.cells[f"first hand-over after the prefill engine was killed and restarted, {SHORT} tokens"] = (
        f"{took:.3f} s, {what}"
    )


def scaled_down(side: Side, _: Path) -> None:
    tokens = side.prompt(SHORT)
    told = prefill_leg(side.prefill, tokens)
    process = side.prefill.process
    assert process is not None
    began = time.monotonic()
    process.signal(signal.SIGTERM)
    time.sleep(2.0)
    took, what = side.hand_over(side.decode.url, tokens, told)
    process.wait(LONGEST_S)
    side.cells["decode leg 2 s after SIGTERM to the prefill engine (--shutdown-timeout 60)"] = (
        f"{took:.3f} s, {what}; the engine ended {time.monotonic() - began:.0f} s after SIGTERM"
    )


def idle(side: Side, _: Path) -> None:
    tokens = side.prompt(SHORT)
    told = prefill_leg(side.prefill, tokens)
    # After a step, vLLM's worker polls for the next step without a pause for some seconds.
    time.sleep(IDLE_AFTER_S)
    before = cpu_seconds(side.prefill)
    time.sleep(IDLE_S)
    used = {name: (after - before[name]) / IDLE_S for name, after in cpu_seconds(side.prefill).items()}
    cores = ", ".join(f"{name} {value:.3f}" for name, value in used.items())
    side.cells[f"cores that the prefill side uses while it keeps KV, over {IDLE_S:g} s"] = cores
    side.hand_over(side.decode.url, tokens, told)


def cpu_seconds(engine: Engine) -> dict[str, float]:
    """Returns the CPU time that the engine's processes and the sidecar's process have used."""
    seconds = {"engine": 0.0, "sidecar": 0.0}
    for pid in group_members(engine.pid):
        with contextlib.suppress(OSError):
            name = "sidecar" if Path(f"/proc/{pid}/comm").read_text().strip() == "sidecar" else "engine"
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds[name] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def other_block_size(side: Side, programs: Path) -> None:
    with changed(side.decode, block_size=64), running_vllm_router(programs, side.prefill, side.decode, LOGS) as url:
        took, what = side.hand_over(url, side.prompt(LONG))
    side.cells[f"blocks of 32 tokens at prefill and 64 at decode, {LONG} tokens"] = f"{took:.3f} s, {what}"


def other_version(side: Side, programs: Path) -> None:
    if not OTHER_PYTHON:
        return
    with (
        changed(side.prefill, python=OTHER_PYTHON),
        running_vllm_router(programs, side.prefill, side.decode, LOGS) as url,
    ):
        took, what = side.hand_over(url, side.prompt(LONG))
    side.cells[f"another version of vLLM at prefill, {LONG} tokens"] = f"{took:.3f} s, {what}"


@contextlib.contextmanager
def changed(engine: Engine, **changes: Any) -> Iterator[None]:
    """Restarts an engine with other options inside the block, and with its earlier options afterwards."""
    options = engine.options
    try:
        restart(engine, replace(options, **changes))
        yield
    finally:
        restart(engine, options)


def restart(engine: Engine, options: EngineOptions) -> None:
    engine.kill()
    engine.options = options
    engine.start()
    wait_for((engine,), Progress())


def seconds(value: float | None) -> str:
    return f"more than {LONGEST_S:g} s" if value is None else f"{value:.0f} s"


CELLS = (
    first_and_later, idle, left_between_the_legs, abandoned, other_block_size, other_version, restarted, scaled_down,
)  # fmt: skip


def table(ours: Side, theirs: Side) -> str:
    rows = ["| | pd-sidecar | NixlConnector |", "|---|---|---|"]
    names = [*ours.cells, *(name for name in theirs.cells if name not in ours.cells)]
    rows += [f"| {name} | {ours.cells.get(name, '-')} | {theirs.cells.get(name, '-')} |" for name in names]
    return "\n".join(rows) + "\n"


def main() -> int:
    progress, programs = Progress(), install()
    model = write_model(ROOT / "target" / "model")
    host = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}
    own = {"PYTHONPATH": str(ROOT / "python"), "PD_SIDECAR_BINARY": str(BINARIES / "sidecar")}
    small = {"LMCACHE_PD_BUFFER_SIZE": str(64 << 20)}
    ours = Side(
        "ours",
        {
            "kv_connector": "PdSidecarConnector",
            "kv_connector_module_path": "pd_sidecar.connector",
            "kv_role": "kv_both",
        },
        {**host, **own, **small},
        model,
    )
    theirs = Side(
        "NixlConnector",
        {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"},
        host,
        model,
    )
    written = ROOT / "target" / "contract.md"
    with ended_by_signals():
        for side in (ours, theirs):
            measure(side, programs, progress)
            written.write_text(table(ours, theirs))
    print(table(ours, theirs))
    print(f"written: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
