"""Tests real routers that name no receiver.

The prefill engine keeps the KV, and the decode side's sidecar fetches the KV.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.client import Answer, call, complete, get_json, post, post_json
from harness.engine import Engine, EngineOptions, wait_for
from harness.metrics import PromptTokens
from harness.model import KV_BYTES_PER_TOKEN, write_model
from harness.pair import BUFFER_BYTES, Pair, check_tokens
from harness.process import ended_by_signals
from harness.prompts import prompt
from harness.reference import Reference
from harness.routers import (
    install,
    prefill_leg,
    running_nixl_proxy,
    running_nixl_push_proxy,
    running_production_stack,
    running_sglang_router,
    running_vllm_router,
)
from harness.sidecar import BINARIES, ROOT
from harness.waiting import BOUND_S, until

TOKENS = 24

# Command of the router of vLLM's production-stack, which is in no package registry. docs/routers.md has an example.
PRODUCTION_STACK = os.environ.get("PD_TEST_PRODUCTION_STACK")

# Maximum CPU use of an engine and of its sidecar while KV is kept, in cores, and the seconds for which it is measured.
IDLE_CORES = (0.05, 0.01)
MEASURED_S = 4.0

# Seconds after which an engine core that does not begin to drain has not seen the signal.
UNSEEN_S = 3.0


@dataclass(frozen=True)
class Router:
    """A router in front of the pair's engines."""

    url: str
    pair: Pair

    def move(self, tokens: list[int], reference: Reference) -> None:
        """Sends a completion through the router, and checks its text and that its KV was moved and used."""
        pair = self.pair
        seen = len(pair.receiver.records())
        before, prefilled = pair.decode.prompt_tokens(), pair.prefill.prompt_tokens()
        answer: Answer = complete(self.url, tokens, max_tokens=24, model="m")
        assert answer.token_ids == reference.token_ids(tokens)
        check_tokens(pair.prompt_tokens_since(before, len(tokens)), len(tokens))
        counted = pair.prompt_tokens_since(prefilled, len(tokens), engine=pair.prefill)
        assert counted.computed == len(tokens)
        until("the receiver has no record of the request", lambda: len(pair.receiver.records()) > seen)
        record = pair.receiver.records()[-1]
        assert (record["reason"], record["bytes"]) == (None, len(tokens) * KV_BYTES_PER_TOKEN), record
        # The two sidecars know the request by the decode engine's id.
        assert pair.sender.record(record["req"])["bytes"] == record["bytes"]


@pytest.fixture
def fetching(pair: Pair) -> Iterator[Pair]:
    """Restarts the sidecars with a fetch port. Yields when the prefill engine knows the port."""
    restart_with_fetch_port(pair)
    yield pair
    # An idle engine frees the blocks of fetched KV with its next step.
    pair.prefill.warm_up()


def restart_with_fetch_port(pair: Pair, **keys: object) -> None:
    """Restarts the sidecars with a fetch port and these keys, and returns when the prefill engine knows the port."""
    pair.restart_sidecars(keys={**pair.sender.options.keys, **keys, "fetch_port": 0})
    port = f"tcp {pair.sender.host}:"
    (fetch,) = [row["address"] for row in pair.sender.status()["listens"] if row["channel"] == "fetch of rank 0"]
    # The scheduler's half learns the port in the next step.
    pair.prefill.warm_up()
    deadline = time.monotonic() + BOUND_S
    while port + str(legs(pair, [2, 3, 4])["remote_port"]) != fetch:
        assert time.monotonic() < deadline, "the prefill engine does not know the fetch port"
        pair.prefill.warm_up()
    pair.reset_prefix_caches()


@pytest.fixture(scope="module")
def routers() -> Path:
    """Installs the routers, once. Returns the folder of the routers' programs."""
    return install()


@pytest.fixture
def vllm_router(routers: Path, fetching: Pair, logs: Path) -> Iterator[Router]:
    with running_vllm_router(routers, fetching.prefill, fetching.decode, logs) as url:
        yield Router(url, fetching)


@pytest.mark.parametrize("tokens", [20, 300, 900])
def test_vllm_router(vllm_router: Router, reference: Reference, tokens: int) -> None:
    vllm_router.move(prompt(tokens, seed=191), reference)


def test_sglang_router_hands_nothing_over(routers: Path, pair: Pair, reference: Reference, logs: Path) -> None:
    """The router sends both legs the whole request, and names the prefill engine in fields that only SGLang knows."""
    question = {"model": "m", "prompt": "read a file, " * 40, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    expect = reference.post("/v1/completions", question)
    tokens = expect["usage"]["prompt_tokens"]
    before, prefilled = pair.decode.prompt_tokens(), pair.prefill.prompt_tokens()
    generated = pair.prefill.metrics().sum("vllm:generation_tokens_total")
    skipped = pair.decode.skipped().get("no_params", 0)
    with running_sglang_router(routers, pair.prefill, pair.decode, logs) as url:
        answer = post_json(f"{url}/v1/completions", question)
    assert answer["choices"][0]["text"] == expect["choices"][0]["text"]
    spent = pair.prompt_tokens_since(before, tokens)
    assert (spent.computed, spent.external) == (tokens, 0), spent
    assert pair.decode.skipped()["no_params"] == skipped + 1
    # The prefill engine computes the same prompt, and the whole answer, too.
    until("the prompt was not computed twice", lambda: (pair.prefill.prompt_tokens() - prefilled).computed == tokens)
    until(
        "the whole answer was not generated twice",
        lambda: pair.prefill.metrics().sum("vllm:generation_tokens_total") - generated == 8,
    )


def test_an_engine_that_keeps_kv_idles(fetching: Pair) -> None:
    pair, tokens = fetching, prompt(300, seed=192)
    told = prefill_leg(pair.prefill, tokens)
    # After a step, vLLM's worker polls for the next step without a pause for some seconds, even if no KV is kept.
    deadline = time.monotonic() + BOUND_S
    while True:
        engine, sidecar = cores_used(pair)
        used = f"{engine:.3f} cores of the engine and {sidecar:.3f} of the sidecar while KV is kept"
        if engine <= IDLE_CORES[0] and sidecar <= IDLE_CORES[1]:
            break
        assert time.monotonic() < deadline, used
    logging.getLogger(__name__).info(used)
    (row,) = pair.sender.kept()
    assert row["tokens"] == len(tokens)
    # The engine runs no step, so its polling thread gathers the KV.
    before, steps = pair.decode.prompt_tokens(), pair.prefill.metrics().sum("vllm:iteration_tokens_total_count")
    decode_leg(pair, tokens, told)
    check_tokens(pair.prompt_tokens_since(before, len(tokens)), len(tokens))
    assert pair.prefill.metrics().sum("vllm:iteration_tokens_total_count") == steps


def test_push_mode(fetching: Pair, reference: Reference, logs: Path) -> None:
    """Both legs come at the same time, so the decode leg names no kept KV: the decode engine computes the prompt."""
    pair, tokens = fetching, prompt(300, seed=196)
    # The KV that nobody fetches would else be kept for 30 s.
    restart_with_fetch_port(pair, max_keep_ms=4000)
    before, prefilled = pair.decode.prompt_tokens(), pair.prefill.prompt_tokens()
    skipped = pair.decode.skipped().get("not_ours", 0)
    seen = len(pair.sender.records())
    with running_nixl_push_proxy(pair.prefill, pair.decode, logs) as url:
        answer = complete(url, tokens, max_tokens=TOKENS, model="m")
    assert answer.token_ids == reference.token_ids(tokens)
    spent = pair.prompt_tokens_since(before, len(tokens))
    assert (spent.computed, spent.external) == (len(tokens), 0), spent
    # The prefill leg may end after the client's answer.
    until(
        "the prefill engine did not compute the prompt",
        lambda: (pair.prefill.prompt_tokens() - prefilled).computed == len(tokens),
    )
    assert pair.decode.skipped()["not_ours"] == skipped + 1
    until("the sender has no record of the request", lambda: len(pair.sender.records()) > seen)
    record = pair.sender.records()[-1]
    assert (record["reason"], record["bytes"]) == ("unclaimed", 0), record


@dataclass(frozen=True)
class Flagged:
    """Two engines that got nothing but the connector's name and role. Each engine has started its own sidecar."""

    prefill: Engine
    decode: Engine

    def move(self, send: Callable[[list[int]], list[int]], tokens: list[int]) -> None:
        """Sends a prompt with `send`, and checks its text and that its KV was moved and used."""
        expect = complete(self.prefill.url, tokens, max_tokens=TOKENS).token_ids
        for engine in (self.prefill, self.decode):
            engine.reset_prefix_cache()
        before, prefilled = self.decode.prompt_tokens(), self.prefill.prompt_tokens()
        seen = len(received(self.decode))
        assert send(tokens) == expect
        until_counted(self.decode, before, len(tokens))
        check_tokens(self.decode.prompt_tokens() - before, len(tokens))
        until_counted(self.prefill, prefilled, len(tokens))
        assert (self.prefill.prompt_tokens() - prefilled).computed == len(tokens)
        until("the receiver has no record of the request", lambda: len(received(self.decode)) > seen)
        record = received(self.decode)[-1]
        assert (record["reason"], record["bytes"]) == (None, len(tokens) * KV_BYTES_PER_TOKEN), record


def until_draining(engine: Engine) -> None:
    """Returns when an engine that got SIGTERM has begun to drain.

    Python does not see a signal that comes in the moment in which its main thread begins to wait for a lock. vLLM's
    engine core then waits for its next request, and sees the signal after it. So this function sends requests.
    """
    process = engine.process
    assert process is not None
    told = "send sigterm to process EngineCore"
    until("the API server did not tell the engine core to end", lambda: told in process.output(), process=process)
    begun = time.monotonic()

    def drains() -> bool:
        if "start mode=drain" in process.output():
            return True
        if time.monotonic() > begun + UNSEEN_S:
            with contextlib.suppress(OSError, http.client.HTTPException):
                call(f"{engine.url}/v1/completions", {"model": "m", "prompt": [1], "max_tokens": 1}, timeout_s=1.0)
        return False

    until("the engine core did not begin to drain", drains, process=process)


def until_counted(engine: Engine, before: PromptTokens, tokens: int) -> None:
    """Returns when the engine has counted `tokens` more prompt tokens than `before`."""
    goal = sum(vars(before).values()) + tokens
    until(
        "the engine did not count the prompt",
        lambda: sum(vars(engine.prompt_tokens()).values()) >= goal,
        process=engine.process,
    )


def received(engine: Engine) -> list[dict[str, Any]]:
    """Returns the records of the receiving side of the sidecar that an engine has started."""
    rows: list[dict[str, Any]] = get_json(f"{admin_of(engine)}/requests")
    return [row for row in rows if row["side"] == "receiver"]


def admin_of(engine: Engine) -> str:
    """Returns the URL of the sidecar's admin server, which stands in the engine's log."""
    assert engine.process is not None
    (address,) = re.findall(r"admin server bound address=(\S+)", engine.process.output())
    return f"http://{address}"


@pytest.fixture(scope="module")
def flagged(logs: Path) -> Iterator[Flagged]:
    module = {"kv_connector_module_path": "pd_sidecar.connector", "kv_role": "kv_both"}
    # One engine uses the name that routers with a closed list of connectors accept.
    names = {"prefill": "PdSidecarConnector", "decode": "NixlConnector"}
    env = {
        "PYTHONPATH": str(ROOT / "python"), "PD_SIDECAR_BINARY": str(BINARIES / "sidecar"),
        # A small machine has no room for buffers of the standard size.
        "LMCACHE_PD_BUFFER_SIZE": str(BUFFER_BYTES),
    }  # fmt: skip
    more = ("--kv-cache-memory-bytes", str(256 << 20), "--shutdown-timeout", "30")
    model = write_model(ROOT / "target" / "model")
    engines = [
        Engine(
            EngineOptions(
                f"flag {name} engine",
                model,
                kv_transfer={"kv_connector": connector, **module},
                core=core,
                forked=True,
                env=env,
                more=more,
            ),
            logs,
        )
        for core, (name, connector) in enumerate(names.items())
    ]
    with ended_by_signals(), contextlib.ExitStack() as stack:
        for engine in engines:
            stack.callback(engine.stop)
            engine.start()
        wait_for(engines)
        yield Flagged(*engines)


@pytest.mark.own_engines
def test_one_flag_behind_vllm_router(flagged: Flagged, routers: Path, logs: Path) -> None:
    with running_vllm_router(routers, flagged.prefill, flagged.decode, logs) as url:
        for tokens in (20, 900):
            flagged.move(
                lambda ids: complete(url, ids, max_tokens=TOKENS, model="m").token_ids, prompt(tokens, seed=193)
            )
    for engine in (flagged.prefill, flagged.decode):
        assert engine.process is not None
        output = engine.process.output()
        assert "kv_load_failure_policy is 'fail'" in output
        # With one flag, the user can do nothing about these warnings.
        assert "no proxy is configured" not in output
        assert "no such key" not in output


@pytest.mark.own_engines
def test_one_flag_behind_the_example_proxy_of_vllm(flagged: Flagged, logs: Path) -> None:
    with running_nixl_proxy(flagged.prefill, flagged.decode, logs) as url:
        for tokens in (20, 900):
            flagged.move(
                lambda ids: complete(url, ids, max_tokens=TOKENS, model="m").token_ids, prompt(tokens, seed=194)
            )


@pytest.mark.own_engines
@pytest.mark.skipif(PRODUCTION_STACK is None, reason="PD_TEST_PRODUCTION_STACK names no command of the router")
def test_one_flag_behind_production_stack(flagged: Flagged, logs: Path) -> None:
    assert PRODUCTION_STACK is not None
    with running_production_stack(PRODUCTION_STACK, flagged.prefill, flagged.decode, logs) as url:
        for tokens in (20, 900):
            flagged.move(
                lambda ids: complete(url, ids, max_tokens=TOKENS, model="m").token_ids, prompt(tokens, seed=197)
            )


@pytest.mark.own_engines
def test_one_flag_behind_the_requests_of_llm_d(flagged: Flagged) -> None:
    """Sends the requests of llm-d's sidecar, which is written in Go: `pkg/sidecar/proxy/connector_nixlv2.go` of
    llm-d-router at commit ebab687927f5331c1b39defcb579a07951bce56c. Both legs have the same request id. The sidecar
    decodes the prefill leg's answer into numbers of 64 bits with a fraction.
    """
    params = {
        "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
        "remote_host": None, "remote_port": None,
    }  # fmt: skip
    limits = {"max_tokens": 1, "max_completion_tokens": 1, "min_tokens": 1}

    def send(tokens: list[int]) -> list[int]:
        name = {"x-request-id": str(uuid.uuid1())}
        client = {"model": "m", "prompt": tokens, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        client["return_token_ids"] = True
        first = {**client, **limits, "stream": False, "kv_transfer_params": params}
        answer = json.loads(post(f"{flagged.prefill.url}/v1/completions", first, name), parse_int=float)
        second = {**client, "kv_transfer_params": answer["kv_transfer_params"]}
        told = json.loads(post(f"{flagged.decode.url}/v1/completions", second, name))
        ids: list[int] = told["choices"][0]["token_ids"]
        return ids

    for tokens in (20, 900):
        flagged.move(send, prompt(tokens, seed=198))


@pytest.mark.own_engines
def test_an_engine_stops_when_its_kept_kv_is_fetched(flagged: Flagged) -> None:
    """Ends the prefill engine, so this test is the last test with these engines."""
    process = flagged.prefill.process
    assert process is not None

    def send(tokens: list[int]) -> list[int]:
        told = prefill_leg(flagged.prefill, tokens)
        process.signal(signal.SIGTERM)
        until_draining(flagged.prefill)
        return complete(flagged.decode.url, tokens, max_tokens=TOKENS, kv_transfer_params=told).token_ids

    tokens = prompt(300, seed=195)
    expect = complete(flagged.decode.url, tokens, max_tokens=TOKENS).token_ids
    flagged.decode.reset_prefix_cache()
    before = flagged.decode.prompt_tokens()
    assert send(tokens) == expect
    until_counted(flagged.decode, before, len(tokens))
    check_tokens(flagged.decode.prompt_tokens() - before, len(tokens))
    process.wait(BOUND_S)
    assert "no decode side has fetched" not in process.output()
    (socket,) = re.findall(r"waiting for the engine socket=(\S+)", process.output())
    until("the sidecar's socket is left", lambda: not list(Path(socket).parent.glob(f"{Path(socket).name}*")))


def cores_used(pair: Pair) -> tuple[float, float]:
    """Returns the numbers of cores that the prefill engine and its sidecar use in the next seconds."""
    engine, sidecar = pair.prefill.process, pair.sender.process
    assert engine is not None and sidecar is not None
    before = engine.cpu_seconds(), sidecar.cpu_seconds()
    time.sleep(MEASURED_S)
    return (engine.cpu_seconds() - before[0]) / MEASURED_S, (sidecar.cpu_seconds() - before[1]) / MEASURED_S


def legs(pair: Pair, tokens: list[int]) -> dict[str, object]:
    """Sends both legs as a router that names no receiver, and returns the parameters in the prefill leg's answer."""
    told = prefill_leg(pair.prefill, tokens)
    decode_leg(pair, tokens, told)
    return told


def decode_leg(pair: Pair, tokens: list[int], told: dict[str, object]) -> None:
    body = {"model": "m", "prompt": tokens, "max_tokens": 1, "kv_transfer_params": told}
    post_json(f"{pair.decode.url}/v1/completions", body)
