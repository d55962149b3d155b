"""Hands over models whose KV has several groups: windows and states beside full attention.

The bytes of each request are computed here from the model's sizes, not by the connector's plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.engine import Engine, EngineOptions, wait_for
from harness.hybrids import WINDOW, write_hybrid
from harness.pair import Moved, Pair, PairOptions, pair_of
from harness.process import ended_by_signals
from harness.progress import Progress
from harness.prompts import prompt
from harness.reference import Reference
from harness.sidecar import CHUNK_TOKENS, ROOT

TOKENS = 16


@dataclass(frozen=True)
class Kind:
    """A model, and the sizes of its groups in bytes. The sizes are those of one rank."""

    name: str
    full: int
    """Bytes of one token in the layers of full attention."""
    window: int = 0
    """Bytes of one token in the layers of a sliding window."""
    state: int = 0
    """Bytes of one request's state."""
    groups: int = 2
    more: tuple[str, ...] = ()

    def bytes(self, tokens: int, have: int = 0) -> int:
        """The bytes that move for a decode side that computes token `tokens` next and has `have` tokens."""
        window = min(tokens - have, WINDOW - 1)
        return (tokens - have) * self.full + window * self.window + self.state


LAYER = 2 * 2 * 32 * 4  # K and V of two heads of size 32, in float32
MAMBA2 = (3 * 288 + 8 * 32 * 16) * 4
NO_CACHE = ("--no-enable-prefix-caching",)
KINDS = {
    "gpt-oss": Kind("gpt-oss", 2 * LAYER, window=2 * LAYER),
    "gemma3": Kind("gemma3", LAYER, window=3 * LAYER, groups=4),
    "granite4": Kind("granite4", LAYER, state=3 * MAMBA2, groups=4, more=NO_CACHE),
}


@dataclass
class Side:
    """A pair, a plain instance and the model that both serve."""

    kind: Kind
    pair: Pair
    reference: Reference
    spoil: Path

    def check(self, tokens: list[int], moved: Moved, *, cached: int = 0, first: str = "decode") -> None:
        """Asserts that the text is right, that the KV moved as computed, and that the decode side computed one."""
        assert moved.answer.token_ids == self.reference.token_ids(tokens, max_tokens=TOKENS), len(tokens)
        resumed = len(tokens) - 1 if first == "decode" else len(tokens)
        assert (moved.tokens.cached, moved.tokens.external) == (cached, resumed - cached), moved.tokens
        assert moved.tokens.computed == 1, moved.tokens
        for record in (moved.sender, moved.receiver):
            assert (record["reason"], record["have_tokens"]) == (None, cached), record
            assert record["bytes"] == self.kind.bytes(resumed, cached), (len(tokens), record)


FURTHER = [pytest.param("gemma3", marks=pytest.mark.models)]


@pytest.fixture(scope="module", params=["gpt-oss", "granite4", *FURTHER])
def side(request: pytest.FixtureRequest, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """Starts the pair and the plain instance of one model."""
    kind = KINDS[request.param]
    model = write_hybrid(ROOT / "target" / "hybrids" / kind.name, kind.name)
    spoil = tmp_path_factory.mktemp("spoil") / "group"
    memory = ("--kv-cache-memory-bytes", str(256 << 20), *kind.more)
    plain = Engine(
        EngineOptions("plain " + kind.name, model, forked=True, more=("--no-enable-prefix-caching", *memory)), logs
    )
    options = PairOptions(
        model,
        logs,
        forked=True,
        prefix=kind.name + "-",
        more=memory,
        buffer_bytes=64 * CHUNK_TOKENS * (kind.full + kind.window),
        sidecar_keys={"park_ms": 3000},
        decode_module="harness.spoiled",
        env={"PD_TEST_SPOIL": str(spoil)},
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        stack.callback(plain.stop)
        progress = Progress()
        plain.start()
        pair = stack.enter_context(pair_of(options, progress))
        wait_for([plain], progress)
        yield Side(kind, pair, Reference(plain), spoil)


@pytest.fixture(autouse=True)
def fresh(side: Side) -> Iterator[None]:
    """Empties the caches before a test, and checks afterwards that no part holds KV."""
    side.pair.reset_prefix_caches()
    yield
    side.pair.wait_empty()


@pytest.mark.own_engines
def test_lengths_around_the_window_and_the_blocks(side: Side) -> None:
    for n in (2, 33, 63, 64, 65, 66, 90, 97, 127, 128, 129, 200, 257, 258, 300, 511, 513, 1001):
        tokens = prompt(n, seed=1000 + n)
        side.check(tokens, side.pair.move(tokens, max_tokens=TOKENS))


@pytest.mark.own_engines
def test_the_text_depends_on_each_group(side: Side) -> None:
    tokens = prompt(300, seed=1)
    expect = side.reference.token_ids(tokens, max_tokens=TOKENS)
    try:
        for group in range(side.kind.groups):
            side.spoil.write_text(str(group))
            side.pair.reset_prefix_caches()
            assert side.pair.move(tokens, max_tokens=TOKENS).answer.token_ids != expect, group
    finally:
        side.spoil.unlink()


@pytest.mark.own_engines
def test_eight_at_once(side: Side) -> None:
    prompts = [prompt(150 + 97 * i, seed=2000 + i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda tokens: side.pair.complete(tokens, max_tokens=TOKENS), prompts))
    for tokens, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == side.reference.token_ids(tokens, max_tokens=TOKENS), len(tokens)
        record = side.pair.receiver.record(answer.headers["x-request-id"])
        assert (record["reason"], record["bytes"]) == (None, side.kind.bytes(len(tokens) - 1)), record
