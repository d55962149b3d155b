"""Tests vLLM's OffloadingConnector and this connector together, under vLLM's MultiConnector: one engine uses KV from
host memory and KV from a transfer.

The engine starts its sidecar itself, with the variables and options of the engine's own command line.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.client import Answer, complete
from harness.engine import Engine, EngineOptions, wait_for
from harness.logs import LOGS
from harness.metrics import PromptTokens
from harness.model import KV_BYTES_PER_TOKEN
from harness.pair import BUFFER_BYTES, Pair
from harness.process import group_members
from harness.prompts import prompt
from harness.reference import Reference
from harness.sidecar import BINARIES, ROOT, Sidecar, SidecarOptions

BLOCK = 32
UCX_TLS = "sm,self,cma"


@dataclass
class Both:
    """A decode engine with both connectors, and its sidecar."""

    engine: Engine
    receiver: Sidecar

    def tokens_of(self, tokens: list[int], params: dict[str, Any] | None = None) -> tuple[Answer, PromptTokens]:
        """Sends a completion to this engine only. Returns the answer and the sources of the prompt's tokens."""
        before = self.engine.prompt_tokens()
        more: dict[str, Any] = {"kv_transfer_params": params} if params else {}
        answer = complete(self.engine.url, tokens, max_tokens=24, **more)
        threading.Event().wait(0.3)  # the engine's counters may change a moment after its answer
        return answer, self.engine.prompt_tokens() - before


@pytest.fixture(scope="module")
def both(engines: tuple[Pair, Reference]) -> Iterator[Both]:
    pair, _ = engines
    folder = Path(tempfile.mkdtemp(prefix="pd-"))
    receiver = Sidecar(SidecarOptions("receiver", BUFFER_BYTES), folder, LOGS, name="offload-receiver")
    connectors = [
        {
            "kv_connector": "PdSidecarConnector", "kv_connector_module_path": "pd_sidecar.connector",
            "kv_role": "kv_consumer", "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"receiver_socket": str(receiver.socket), "sidecar": "spawn"},
        },
        {
            "kv_connector": "OffloadingConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "spec_name": "HostOffloadingSpec", "spec_module_path": "harness.host_offload",
                "cpu_bytes_to_use": 1 << 28,
            },
        },
    ]  # fmt: skip
    transfer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": connectors},
    }
    env = {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("python", "tests")),
        "PD_SIDECAR_BINARY": str(BINARIES / "sidecar"), "LMCACHE_CONFIG_FILE": str(receiver.configure()),
        "UCX_TLS": UCX_TLS,
    }  # fmt: skip
    options = EngineOptions(
        "offload engine", pair.options.model, block_size=BLOCK, kv_transfer=transfer, core=1, forked=True, env=env
    )
    engine = Engine(options, LOGS)
    try:
        engine.start()
        # The sidecar writes into the engine's log, and ends with the engine.
        receiver.process = engine.process
        wait_for([engine])
        receiver.wait_ready()
        yield Both(engine, receiver)
    finally:
        engine.stop()
        shutil.rmtree(folder, ignore_errors=True)


def sidecars_of(engine: Engine) -> list[int]:
    """Returns the ids of the sidecar processes that an engine has started."""
    program = f"{BINARIES / 'sidecar'}\0".encode()
    found = []
    for pid in group_members(engine.pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(program):
                found.append(pid)
    return found


def wait_for_other(engine: Engine, than: list[int], bound_s: float = 20.0) -> list[int]:
    """Waits until an engine has other sidecar processes than before, and returns their ids."""
    deadline = time.monotonic() + bound_s
    while (now := sidecars_of(engine)) == than:
        assert time.monotonic() < deadline, f"still {than} after {bound_s:g} s"
        time.sleep(0.1)
    return now


def moved(pair: Pair, both: Both, req: str, tokens: list[int]) -> tuple[Answer, PromptTokens]:
    """Sends both legs at once, as the proxy does, so that the sender learns which KV the decode side already holds."""
    to = both.receiver
    spec = {
        "req_id": req, "receiver_host": to.host, "receiver_init_port": [to.init_port],
        "receiver_alloc_port": [to.alloc_port], "overlap": True,
    }  # fmt: skip
    params = {"do_remote_decode": True, "disagg_spec": spec}
    leg = threading.Thread(target=complete, args=(pair.prefill.url, tokens), kwargs={
        "max_tokens": 1, "kv_transfer_params": params,
    })  # fmt: skip
    leg.start()
    try:
        return both.tokens_of(tokens, {"do_remote_prefill": True, "disagg_spec": {"req_id": req}})
    finally:
        leg.join()


def test_reuse_and_transfer_together(pair: Pair, both: Both, reference: Reference) -> None:
    first = prompt(600, seed=5)
    second, third = first + prompt(200, seed=6), first + prompt(200, seed=6) + prompt(300, seed=7)

    # Transferred KV is offloaded like computed KV.
    answer, tokens = moved(pair, both, "offload-1", first)
    assert answer.token_ids == reference.token_ids(first)
    assert tokens.computed <= 1
    record = both.receiver.record("offload-1")
    assert (record["reason"], record["bytes"]) == (None, len(first) * KV_BYTES_PER_TOKEN), record
    # The sidecar has found the NIXL library of the engine's Python environment.
    assert record["transport"] == "nixl", record

    # The engine's own cache is now empty. A request without a transfer gets the KV from host memory.
    both.engine.reset_prefix_cache()
    answer, tokens = both.tokens_of(second)
    assert answer.token_ids == reference.token_ids(second)
    kept = len(first) // BLOCK * BLOCK
    assert tokens.external == kept, tokens
    assert tokens.computed == len(second) - kept, tokens

    # KV from host memory is not transferred again. Only the KV of the new tokens is transferred.
    answer, tokens = moved(pair, both, "offload-2", third)
    assert answer.token_ids == reference.token_ids(third)
    held = len(second) // BLOCK * BLOCK
    assert tokens.cached == held, tokens
    assert tokens.computed <= 1, tokens
    record = both.receiver.record("offload-2")
    assert (record["reason"], record["have_tokens"]) == (None, held), record
    assert record["bytes"] == (len(third) - held) * KV_BYTES_PER_TOKEN, record
    both.receiver.wait_empty()


def test_the_spawned_sidecar_is_watched_and_ends_with_its_engine(pair: Pair, both: Both, reference: Reference) -> None:
    """Kills the sidecar, and then the engine. So this must be the last test of this engine."""
    (first,) = sidecars_of(both.engine)
    environ = Path(f"/proc/{first}/environ").read_bytes().split(b"\0")
    assert f"UCX_TLS={UCX_TLS}".encode() in environ

    # The engine replaces a killed sidecar, and then uses the new sidecar.
    os.kill(first, signal.SIGKILL)
    wait_for_other(both.engine, [first])
    both.receiver.wait_ready()
    tokens = prompt(300, seed=8)
    answer, spent = moved(pair, both, "offload-3", tokens)
    assert answer.token_ids == reference.token_ids(tokens)
    assert spent.computed <= 1, spent

    (second,) = wait_for_other(both.engine, [])
    assert both.engine.process is not None
    both.engine.process.signal(signal.SIGTERM)
    assert wait_for_other(both.engine, [second]) == []
