"""Tests tensor-parallel engines on two GPUs.

Each rank's KV goes from the GPU of its prefill worker to the GPU of its decode worker. The two sides may have different
numbers of workers. If a side has only one worker, its two ranks share a GPU.

`PD_GPU_TESTS_ON_CPU=1` runs the tests with engines on the CPU and a tiny model.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from harness.client import Answer, complete
from harness.engine import Engine, wait_for
from harness.metrics import PromptTokens
from harness.process import ended_by_signals
from harness.proxy import Proxy
from harness.sidecar import CHUNK_TOKENS, ROOT, Sidecar, SidecarOptions

from gpu.measure import Prompts
from gpu.setting import ON_CPU, UCX, Setting, gpus
from gpu.small import VOCABULARY, small
from gpu.stacks import with_path
from gpu.texts import Match, Reference, reference

FOUND = gpus()
if len(FOUND) < 2 and not ON_CPU:
    pytest.skip(f"NOT TESTED: tensor parallelism needs two GPUs, and there are {len(FOUND)}", allow_module_level=True)

RANKS = 2
TOKENS = 12
LENGTHS = (1, 300, 1100) if ON_CPU else (1, 300, 1100, 2500)
AT_ONCE = (40, 300, 777, 1500) if ON_CPU else (1, 257, 512, 700, 1100, 1500, 2049, 2500)
# Number of chunks in each rank's buffer. The prompts of `AT_ONCE` together need fewer chunks.
CHUNKS = 64
# Time limit for an engine's counters, which change a moment after its answers.
COUNTERS_S = 15.0
FOLDER = ROOT / "target" / "gpu-ranks"

# Numbers of workers of prefill and decode. The workers of vLLM's CPU build use a whole core while they wait for each
# other, so a machine with few cores runs only one size.
SIZES = {"2 to 2": (2, 2), "1 to 2": (1, 2), "2 to 1": (2, 1)}
if ON_CPU and (os.cpu_count() or 1) < 6:
    SIZES = {"2 to 1": (2, 1)}
ROLES = {"kv_producer": "sender", "kv_consumer": "receiver"}


class Side:
    """An engine with its sidecar. Each rank's buffer is on the GPU of the worker that serves the rank."""

    def __init__(self, setting: Setting, folder: Path, kv_role: str, workers: int) -> None:
        side = list(ROLES).index(kv_role)
        role, name = ROLES[kv_role], f"tp{workers} {ROLES[kv_role]}"
        keys: dict[str, object] = {"nixl_over_tcp": "trusted", **setting.sidecar_keys}
        options = SidecarOptions(role, setting.buffer_bytes, ranks=RANKS, keys=keys)
        if setting.gpus is not None:
            each = RANKS // workers
            options.device = ",".join(f"cuda:{gpu}" for gpu in setting.gpus_of(side, workers) for _ in range(each))
            options.env = {"UCX_TLS": UCX}
        self.sidecar = Sidecar(options, folder, setting.logs, name=name.replace(" ", "-"))
        transfer = {
            "kv_connector": "PdSidecarConnector",
            "kv_connector_module_path": "pd_sidecar.connector",
            "kv_role": kv_role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                f"{role}_socket": str(self.sidecar.socket),
                "chunk_size": CHUNK_TOKENS,
                "push": setting.push,
                **({} if workers == RANKS else {"ranks": RANKS}),
            },
        }
        path = with_path(ROOT / "python")
        if ON_CPU and workers > 1:
            path += os.pathsep + str(ROOT / "tests" / "harness" / "patient")
        self.engine: Engine = setting.engine(f"{name} engine", side, transfer, {"PYTHONPATH": path}, workers)
        options.engine_url = self.engine.url

    def wait_empty(self) -> None:
        """Returns when the sidecar holds no slot, and the engine has no request and holds no KV block."""
        self.sidecar.wait_empty()
        deadline = time.monotonic() + COUNTERS_S
        while (held := (self.engine.requests(), self.engine.cache_usage())) != (0, 0.0):
            assert time.monotonic() < deadline, f"{self.engine.options.name}: {held}"
            time.sleep(0.05)

    def spent(self, before: PromptTokens, tokens: int) -> PromptTokens:
        """Returns the engine's prompt tokens by source, after the engine has counted `tokens` of them."""
        deadline = time.monotonic() + COUNTERS_S
        while True:
            found = self.engine.prompt_tokens() - before
            if found.external + found.computed >= tokens or time.monotonic() > deadline:
                return found
            time.sleep(0.05)


@dataclass(frozen=True)
class Case:
    """A prefill and a decode side with the proxy in front."""

    setting: Setting
    proxy: Proxy
    prefill: Side
    decode: Side

    def ask(self, prompt: list[int]) -> Answer:
        return complete(self.proxy.url, prompt, max_tokens=TOKENS)

    def expect(self, prompt: list[int]) -> Reference:
        """Returns the answer of the decode engine when it computes the whole prompt itself."""
        before = self.decode.engine.prompt_tokens()
        found = reference(self.decode.engine.url, prompt, TOKENS)
        spent = self.decode.spent(before, len(prompt))
        assert (spent.computed, spent.external) == (len(prompt), 0), spent
        return found

    def check(self, answer: Answer, expected: Reference, tokens: int) -> Match:
        """Checks the text, and that each rank moved its whole half of the KV. Returns `EQUAL` or `TIE`."""
        match = expected.match(answer.text)
        assert match != Match.WRONG, (tokens, answer.text, expected.text)
        for side in (self.prefill, self.decode):
            for rank, record in enumerate(side.sidecar.record_of_each_rank(answer.headers["x-request-id"])):
                assert record["reason"] is None, record
                assert record["bytes"] == tokens * self.setting.token_bytes // RANKS, (rank, record)
        return match

    def check_tokens(self, before: PromptTokens, tokens: int, requests: int) -> None:
        """Asserts that the decode side computed only the last token of each prompt."""
        spent = self.decode.spent(before, tokens)
        assert spent.external >= tokens - requests, spent
        assert spent.computed <= requests, spent


def make_setting() -> Setting:
    keys: dict[str, object] = {"park_ms": 1000, "checksum": True}
    if ON_CPU:
        # Busy workers share two cores, so sidecars run late. Longer limits keep a late sidecar from being treated as
        # dead.
        keys |= {"park_ms": 3000, "heartbeat_ms": 5000, "register_ms": 5000, "no_sender_ms": 20_000}
    setting = small(FOLDER, (0, 1), CHUNKS, sidecar_keys=keys)
    return replace(setting, buffer_bytes=setting.buffer_bytes // RANKS)


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Setting, dict[tuple[str, int], Side]]]:
    """Starts all engines at the same time. Each case starts and stops the sidecars that it needs."""
    setting = make_setting()
    folder = Path(tempfile.mkdtemp(prefix="pd-"))
    wanted = {(role, size[at]) for size in SIZES.values() for at, role in enumerate(ROLES)}
    made = {(role, workers): Side(setting, folder, role, workers) for role, workers in sorted(wanted)}
    engines = [side.engine for side in made.values()]
    with ended_by_signals():
        try:
            for engine in engines:
                engine.start()
            wait_for(engines)
            yield setting, made
        finally:
            for side in made.values():
                side.engine.stop()
                side.sidecar.stop()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", params=SIZES)
def started(request: pytest.FixtureRequest, sides: tuple[Setting, dict[tuple[str, int], Side]]) -> Iterator[Case]:
    setting, made = sides
    workers = SIZES[request.param]
    prefill, decode = (made[role, size] for role, size in zip(ROLES, workers, strict=True))
    case = Case(setting, Proxy(setting.logs), prefill, decode)
    parts = (case.proxy, decode.sidecar, prefill.sidecar)
    try:
        for part in parts:
            if isinstance(part, Sidecar):
                part.options.proxy = case.proxy.registration
            part.start()
        for side in (prefill, decode):
            side.sidecar.wait_ready()
        case.proxy.wait_ready()
        # The first request of an engine compiles kernels.
        case.ask([5, 6, 7])
        yield case
    finally:
        for part in parts:
            part.stop()


@pytest.fixture
def case(started: Case) -> Iterator[Case]:
    yield started
    for side in (started.prefill, started.decode):
        side.wait_empty()


def test_buffers_are_on_the_gpus_of_the_workers(case: Case) -> None:
    """Checks that each rank has one link, to a peer of its own, and that the texts depend on the KV."""
    links = case.prefill.sidecar.status()["links"]
    assert [link["rank"] for link in links] == list(range(RANKS)), links
    assert len({link["peer"] for link in links}) == RANKS, links
    print(f"{case.prefill.sidecar.options.device} -> {case.decode.sidecar.options.device}: {links}")
    one, other = (Prompts(seed, VOCABULARY).next(300) for seed in (7, 8))
    assert case.expect(one).text != case.expect([*other[:-1], one[-1]]).text


@pytest.mark.parametrize("length", LENGTHS)
def test_alone(case: Case, length: int) -> None:
    prompt = Prompts(length, VOCABULARY).next(length)
    expected = case.expect(prompt)
    before = case.decode.engine.prompt_tokens()
    match = case.check(case.ask(prompt), expected, length)
    case.check_tokens(before, length, 1)
    print(f"{length} tokens: {match.value}")


def test_several_at_once(case: Case) -> None:
    draw = Prompts(9, VOCABULARY)
    prompts = [draw.next(length) for length in AT_ONCE]
    expected = [case.expect(prompt) for prompt in prompts]
    before = case.decode.engine.prompt_tokens()
    with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
        answers = list(pool.map(case.ask, prompts))
    checked = [case.check(*of) for of in zip(answers, expected, AT_ONCE, strict=True)]
    case.check_tokens(before, sum(AT_ONCE), len(prompts))
    print(f"{len(checked)} at once: {sum(match == Match.EQUAL for match in checked)} texts equal, the others tie")
