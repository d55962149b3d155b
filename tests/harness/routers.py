"""Runs routers of other projects, and plays a router that names no receiver."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.client import call, post_json
from harness.engine import Engine
from harness.ports import free_port
from harness.process import Process
from harness.sidecar import ROOT

ROUTERS = ROOT / "target" / "routers-venv"
BOUND_S = 30.0


def install() -> Path:
    """Installs the routers, once. Returns the folder of the routers' programs."""
    subprocess.run([ROOT / "scripts" / "routers.sh", ROUTERS], check=True)
    return ROUTERS / "bin"


@contextlib.contextmanager
def running_vllm_router(routers: Path, prefill: Engine, decode: Engine, logs: Path) -> Iterator[str]:
    """Runs vllm-router in front of two engines inside the block. Yields its URL when it serves."""
    port = free_port()
    command: list[str | Path] = [
        routers / "vllm-router", "--host", "127.0.0.1", "--port", str(port), "--vllm-pd-disaggregation",
        "--kv-connector", "nixl", "--prefill", prefill.url, "--decode", decode.url,
        "--policy", "round_robin", "--prometheus-port", str(free_port()),
    ]  # fmt: skip
    process = Process("vllm-router", command, logs / "vllm-router.log")
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(f"{url}/v1/models"), process)
        yield url
    finally:
        process.stop()


def prefill_leg(engine: Engine, tokens: list[int]) -> dict[str, object]:
    """Sends the prefill leg as vLLM's example proxy for NixlConnector. Returns the parameters in the answer."""
    params = {
        "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
        "remote_host": None, "remote_port": None,
    }  # fmt: skip
    body = {"model": "m", "prompt": tokens, "max_tokens": 1, "kv_transfer_params": params}
    told: dict[str, object] = post_json(f"{engine.url}/v1/completions", body)["kv_transfer_params"]
    return told


def answers(url: str) -> bool:
    try:
        return call(url, timeout_s=2.0)[0] == 200
    except OSError:
        return False


def until(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        if not process.alive or time.monotonic() > deadline:
            raise process.failure(f"not ready after {BOUND_S:g} s")
        time.sleep(0.05)
