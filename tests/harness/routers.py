"""Runs routers of other projects, and plays a router that names no receiver."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.client import call, get_json, post_json
from harness.drop_in.forked import LMCACHE_PYTHON
from harness.engine import Engine
from harness.pair import BUFFER_BYTES
from harness.ports import free_port
from harness.process import Process
from harness.sidecar import ROOT
from harness.waiting import until

ROUTERS = ROOT / "target" / "routers-venv"
EXAMPLES = ROOT / "target" / "example-proxies"
BOUND_S = 60.0
# LMCache's proxy imports torch, and an engine collects facts about its machine.
START_BOUND_S = 150.0


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
        until("not ready", lambda: answers(f"{url}/v1/models"), process=process)
        yield url
    finally:
        process.stop()


@contextlib.contextmanager
def running_sglang_router(routers: Path, prefill: Engine, decode: Engine, logs: Path) -> Iterator[str]:
    """Runs sglang-router in its mode for prefill and decode instances of SGLang, in front of two engines of vLLM."""
    port = free_port()
    for engine in (prefill, decode):
        # With VLLM_SERVER_DEV_MODE an engine answers this request of the router. The first answer can take longer than
        # the ten seconds that the router waits.
        get_json(f"{engine.url}/server_info", timeout_s=START_BOUND_S)
    command: list[str | Path] = [
        routers / "python", "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
        "--pd-disaggregation", "--prefill", prefill.url, "--decode", decode.url,
        "--policy", "round_robin", "--prometheus-port", str(free_port()),
    ]  # fmt: skip
    process = Process("sglang-router", command, logs / "sglang-router.log")
    url = f"http://127.0.0.1:{port}"
    try:
        # The router has no worker until it has asked both engines for their properties.
        until("not ready", lambda: answers(f"{url}/readiness"), process=process)
        yield url
    finally:
        process.stop()


@contextlib.contextmanager
def running_production_stack(command: str, prefill: Engine, decode: Engine, logs: Path) -> Iterator[str]:
    """Runs the router of vLLM's production-stack inside the block, with the mode that hands KV over.

    `command` starts the router without arguments, for example `python -m vllm_router.app`. Yields its URL.
    """
    port = free_port()
    arguments = [
        "--host", "127.0.0.1", "--port", str(port), "--service-discovery", "static",
        "--static-backends", f"{prefill.url},{decode.url}", "--static-models", "m,m",
        "--static-model-labels", "prefill,decode", "--prefill-model-labels", "prefill",
        "--decode-model-labels", "decode", "--routing-logic", "disaggregated_prefill_orchestrated",
    ]  # fmt: skip
    process = Process("production-stack", [*shlex.split(command), *arguments], logs / "production-stack.log")
    url = f"http://127.0.0.1:{port}"
    try:
        until("not ready", lambda: answers(f"{url}/health"), process=process, bound_s=START_BOUND_S)
        yield url
    finally:
        process.stop()


def install_examples() -> Path:
    """Fetches the example proxies of vLLM and LMCache, once. Returns their folder."""
    subprocess.run([sys.executable, ROOT / "scripts" / "example_proxies.py", EXAMPLES], check=True)
    return EXAMPLES


@contextlib.contextmanager
def running_nixl_proxy(prefill: Engine, decode: Engine, logs: Path) -> Iterator[str]:
    """Runs vLLM's example proxy for NixlConnector inside the block. Yields its URL when it serves."""
    arguments = [
        "--host", "127.0.0.1", "--prefiller-host", "127.0.0.1", "--prefiller-port", str(prefill.port),
        "--decoder-host", "127.0.0.1", "--decoder-port", str(decode.port),
    ]  # fmt: skip
    with _running_example(
        [sys.executable, install_examples() / "nixl_proxy.py"], arguments, "healthcheck", logs
    ) as url:
        yield url


@contextlib.contextmanager
def running_nixl_push_proxy(prefill: Engine, decode: Engine, logs: Path) -> Iterator[str]:
    """Runs vLLM's example proxy for NixlPushConnector inside the block: the proxy sends both legs at the same time."""
    arguments = [
        "--model", "m", "--prefill", f"127.0.0.1:{prefill.port}", "--decode", f"127.0.0.1:{decode.port}",
        "--prefill-engine-id", "prefill", "--prefill-kv-host", "127.0.0.1", "--prefill-side-channel-port", "5600",
    ]  # fmt: skip
    with _running_example(
        [sys.executable, install_examples() / "nixl_push_proxy.py"], arguments, "status", logs
    ) as url:
        yield url


@contextlib.contextmanager
def running_lmcache_proxy(
    prefill: Engine, decode: Engine, model: Path, receiver_ports: tuple[int, int], notices: int, logs: Path
) -> Iterator[str]:
    """Runs LMCache's example proxy inside the block.

    The proxy reads the size of a token's KV from the configuration of `model`, to limit the requests under way.
    `receiver_ports` are the init port and the alloc port that the proxy gives to the prefill engine, `notices` is the
    port on which the proxy waits for `ProxyNotif`.
    """
    init, alloc = receiver_ports
    arguments = [
        "--host", "127.0.0.1", "--model", str(model), "--pd-buffer-size", str(BUFFER_BYTES),
        "--prefiller-host", "127.0.0.1", "--prefiller-port", str(prefill.port),
        "--decoder-host", "127.0.0.1", "--decoder-port", str(decode.port),
        "--decoder-init-port", str(init), "--decoder-alloc-port", str(alloc),
        "--proxy-host", "127.0.0.1", "--proxy-port", str(notices),
    ]  # fmt: skip
    program = [LMCACHE_PYTHON, install_examples() / "lmcache_proxy.py"]
    with _running_example(program, arguments, "docs", logs) as url:
        yield url


@contextlib.contextmanager
def _running_example(program: Sequence[str | Path], arguments: list[str], path: str, logs: Path) -> Iterator[str]:
    """Runs an example proxy inside the block. Yields its URL when it answers `path`."""
    port, name = free_port(), Path(program[-1]).stem.replace("_", "-")
    command = [*program, "--port", str(port), *arguments]
    # The proxies send this key to the engines, and send the text "None" if there is no key.
    process = Process(name, command, logs / f"{name}.log", {"OPENAI_API_KEY": "none"})
    url = f"http://127.0.0.1:{port}"
    try:
        until("not ready", lambda: answers(f"{url}/{path}"), process=process, bound_s=START_BOUND_S)
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
