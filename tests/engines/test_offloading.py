"""Tests vLLM's OffloadingConnector and this connector together, under vLLM's MultiConnector: one engine uses KV from
host memory, KV from a transfer, and KV from a store.

The engines start their sidecars themselves, with the variables and options of the engine's own command line.
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
from harness.pair import BUFFER_BYTES, Pair, check_tokens
from harness.process import group_members
from harness.prompts import prompt
from harness.reference import Reference
from harness.sidecar import BINARIES, ROOT, Sidecar, SidecarOptions
from harness.store import Store, below
from harness.waiting import until

BLOCK = 32
UCX_TLS = "sm,self,cma"
STORE_TIMEOUT_S = 4.0
BOUND_S = 60.0


@dataclass
class Both:
    """An engine with both connectors, and its sidecar."""

    engine: Engine
    sidecar: Sidecar

    def tokens_of(self, tokens: list[int], params: dict[str, Any] | None = None) -> tuple[Answer, PromptTokens]:
        """Sends a completion to this engine only. Returns the answer and the sources of the prompt's tokens."""
        before = self.engine.prompt_tokens()
        more: dict[str, Any] = {"kv_transfer_params": params} if params else {}
        answer = complete(self.engine.url, tokens, max_tokens=24, **more)
        return answer, spent_since(self.engine, before, len(tokens))


def spent_since(engine: Engine, before: PromptTokens, at_least: int) -> PromptTokens:
    """Returns the prompt tokens of an engine since `before`. Its counters may change a moment after its answer."""
    deadline = time.monotonic() + BOUND_S
    while True:
        spent = engine.prompt_tokens() - before
        if spent.external + spent.cached + spent.computed >= at_least:
            return spent
        assert time.monotonic() < deadline, spent
        time.sleep(0.05)


@dataclass
class Fleet:
    """A decode engine and a prefill engine with one store below them."""

    decode: Both
    prefill: Both
    store: Store


@pytest.fixture(scope="module")
def fleet(engines: tuple[Pair, Reference]) -> Iterator[Fleet]:
    pair, _ = engines
    store = Store(LOGS, "--memory", "256MiB")
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="pd-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        store.start()
        stack.callback(store.stop)
        decode, prefill = (
            started(stack, engine_with_both(role, pair.options.model, folder, store))
            for role in ("kv_consumer", "kv_producer")
        )
        wait_for([decode.engine, prefill.engine])
        for both in (decode, prefill):
            both.sidecar.wait_ready()
        yield Fleet(decode, prefill, store)


def started(stack: contextlib.ExitStack, both: Both) -> Both:
    both.engine.start()
    stack.callback(both.engine.stop)
    # The sidecar writes into the engine's log, and ends with the engine.
    both.sidecar.process = both.engine.process
    return both


def engine_with_both(role: str, model: Path, folder: Path, store: Store) -> Both:
    side = "sender" if role == "kv_producer" else "receiver"
    # The default of `park_ms` is 50 ms. A busy machine may need longer to park a decode request.
    keys: dict[str, object] = {"park_ms": 3000}
    sidecar = Sidecar(SidecarOptions(side, BUFFER_BYTES, keys=keys), folder, LOGS, name=f"offload-{side}")
    own = {
        "kv_connector": "PdSidecarConnector", "kv_connector_module_path": "pd_sidecar.connector",
        "kv_role": role, "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {f"{side}_socket": str(sidecar.socket), "sidecar": "spawn"},
    }  # fmt: skip
    transfer = below(own, store, STORE_TIMEOUT_S)
    env = {
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("python", "tests")),
        "PD_SIDECAR_BINARY": str(BINARIES / "sidecar"), "LMCACHE_CONFIG_FILE": str(sidecar.configure()),
        "UCX_TLS": UCX_TLS,
    }  # fmt: skip
    options = EngineOptions(
        f"offload {side} engine", model, block_size=BLOCK, kv_transfer=transfer, core=int(side == "receiver"),
        forked=True, env=env,
    )  # fmt: skip
    return Both(Engine(options, LOGS), sidecar)


def sidecars_of(engine: Engine) -> list[int]:
    """Returns the ids of the sidecar processes that an engine has started."""
    program = f"{BINARIES / 'sidecar'}\0".encode()
    found = []
    for pid in group_members(engine.pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(program):
                found.append(pid)
    return found


def wait_for_other(engine: Engine, than: list[int], bound_s: float = BOUND_S) -> list[int]:
    """Waits until an engine has other sidecar processes than before, and returns their ids."""
    deadline = time.monotonic() + bound_s
    while (now := sidecars_of(engine)) == than:
        assert time.monotonic() < deadline, f"still {than} after {bound_s:g} s"
        time.sleep(0.1)
    return now


def moved(prefill: Engine, decode: Both, req: str, tokens: list[int]) -> tuple[Answer, PromptTokens]:
    """Sends both legs at once, as the proxy does, so that the sender learns which KV the decode side already holds."""
    to = decode.sidecar
    spec = {
        "req_id": req, "receiver_host": to.host, "receiver_init_port": [to.init_port],
        "receiver_alloc_port": [to.alloc_port], "overlap": True,
    }  # fmt: skip
    params = {"do_remote_decode": True, "disagg_spec": spec}
    leg = threading.Thread(target=complete, args=(prefill.url, tokens), kwargs={
        "max_tokens": 1, "kv_transfer_params": params,
    })  # fmt: skip
    leg.start()
    try:
        return decode.tokens_of(tokens, {"do_remote_prefill": True, "disagg_spec": {"req_id": req}})
    finally:
        leg.join()


def test_reuse_and_transfer_together(pair: Pair, fleet: Fleet, reference: Reference) -> None:
    both = fleet.decode
    first = prompt(600, seed=5)
    second, third = first + prompt(200, seed=6), first + prompt(200, seed=6) + prompt(300, seed=7)

    # Transferred KV is offloaded like computed KV.
    answer, tokens = moved(pair.prefill, both, "offload-1", first)
    assert answer.token_ids == reference.token_ids(first)
    assert tokens.computed <= 1
    record = both.sidecar.record("offload-1")
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
    answer, tokens = moved(pair.prefill, both, "offload-2", third)
    assert answer.token_ids == reference.token_ids(third)
    held = len(second) // BLOCK * BLOCK
    assert tokens.cached == held, tokens
    assert tokens.computed <= 1, tokens
    record = both.sidecar.record("offload-2")
    assert (record["reason"], record["have_tokens"]) == (None, held), record
    assert record["bytes"] == (len(third) - held) * KV_BYTES_PER_TOKEN, record
    both.sidecar.wait_empty()


def test_what_the_decode_side_has_is_loaded_by_another_prefill_engine(
    pair: Pair, fleet: Fleet, reference: Reference
) -> None:
    """The second turn of a conversation, at a prefill engine that has seen nothing of the first."""
    decode, prefill, store = fleet.decode, fleet.prefill, fleet.store
    first = prompt(600, seed=15)
    answer, _ = moved(pair.prefill, decode, "store-1", first)
    assert answer.token_ids == reference.token_ids(first)
    # The KV of the last token is not computed.
    said = first + answer.token_ids[:-1]
    kept = len(said) // BLOCK * BLOCK
    assert kept > len(first), "the store must hold a block with generated tokens"
    until("the KV is not put", lambda: store.metrics().sum("pd_store_put_bytes") >= kept * KV_BYTES_PER_TOKEN)

    second = said + prompt(100, seed=16)
    before, got = prefill.engine.prompt_tokens(), store.metrics().sum("pd_store_get_bytes")
    pair.decode.reset_prefix_cache()
    answer, tokens = moved(prefill.engine, Both(pair.decode, pair.receiver), "store-2", second)
    assert answer.token_ids == reference.token_ids(second)
    check_tokens(tokens, len(second))
    record = pair.receiver.record("store-2")
    assert (record["reason"], record["bytes"]) == (None, len(second) * KV_BYTES_PER_TOKEN), record
    spent = spent_since(prefill.engine, before, len(second))
    assert (spent.external, spent.computed) == (kept, len(second) - kept), spent
    # The store counts bytes a moment after it has sent them.
    loaded = kept * KV_BYTES_PER_TOKEN
    until("the KV is not read", lambda: store.metrics().sum("pd_store_get_bytes") - got >= loaded)
    assert store.metrics().sum("pd_store_get_bytes") - got == loaded


@pytest.mark.parametrize("ending", [signal.SIGSTOP, signal.SIGKILL])
def test_without_the_store_prompts_are_computed(
    pair: Pair, fleet: Fleet, reference: Reference, ending: signal.Signals
) -> None:
    store, prefill = fleet.store, fleet.prefill
    assert store.process is not None
    store.process.signal(ending)
    try:
        tokens = prompt(300, seed=17 + ending)
        before, began = prefill.engine.prompt_tokens(), time.monotonic()
        answer, spent = moved(prefill.engine, Both(pair.decode, pair.receiver), f"store-{ending.name}", tokens)
        assert time.monotonic() - began < BOUND_S
        assert answer.token_ids == reference.token_ids(tokens)
        check_tokens(spent, len(tokens))
        assert spent_since(prefill.engine, before, len(tokens)).computed == len(tokens)
    finally:
        if ending == signal.SIGSTOP:
            store.process.signal(signal.SIGCONT)
        else:
            store.stop()
            store.start()


def test_the_spawned_sidecar_is_watched_and_ends_with_its_engine(
    pair: Pair, fleet: Fleet, reference: Reference
) -> None:
    """Kills the sidecar, and then the engine. So this must be the last test of this engine."""
    both = fleet.decode
    (first,) = sidecars_of(both.engine)
    environ = Path(f"/proc/{first}/environ").read_bytes().split(b"\0")
    assert f"UCX_TLS={UCX_TLS}".encode() in environ

    # The engine replaces a killed sidecar, and then uses the new sidecar.
    os.kill(first, signal.SIGKILL)
    wait_for_other(both.engine, [first])
    both.sidecar.wait_ready()
    tokens = prompt(300, seed=8)
    answer, spent = moved(pair.prefill, both, "offload-3", tokens)
    assert answer.token_ids == reference.token_ids(tokens)
    assert spent.computed <= 1, spent

    (second,) = wait_for_other(both.engine, [])
    assert both.engine.process is not None
    both.engine.process.signal(signal.SIGTERM)
    assert wait_for_other(both.engine, [second]) == []
