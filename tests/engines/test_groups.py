"""Hands over models whose KV has several groups, windows and states beside full attention, and other kinds of models.

The bytes of each request are computed here from the model's sizes, not by the connector's plan.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from harness.client import Answer, Stream, complete, post_json
from harness.engine import Engine, EngineOptions, wait_for
from harness.hybrids import WINDOW, write_hybrid
from harness.pair import Pair, PairOptions, pair_of
from harness.process import ended_by_signals
from harness.progress import Progress
from harness.prompts import prompt
from harness.reference import Reference
from harness.routers import prefill_leg
from harness.sidecar import CHUNK_TOKENS, ROOT
from harness.traffic import Traffic

TOKENS, SEQUENCES = 16, 3
BOUND_S = 60.0
# The most probable tokens of each place, by number, with their log-probabilities.
TOP: dict[str, Any] = {"logprobs": 5, "return_tokens_as_token_ids": True}


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
    near: float = 0.0
    """Largest difference of log-probabilities that rounding explains. A model in float32 gives equal texts."""
    dtype: str = "float32"
    more: tuple[str, ...] = ()
    older: bool = False
    """True if the connectors use only what vLLM 0.24 offers."""

    @property
    def last(self) -> int:
        """The number of prompt tokens that the prefill side leaves to the decode side."""
        return int(bool(self.window or self.state))

    def bytes(self, tokens: int, have: int = 0) -> int:
        """The bytes that move for a decode side that computes token `tokens` next and has `have` tokens."""
        window = min(tokens - have, WINDOW - 1)
        return (tokens - have) * self.full + window * self.window + self.state

    def is_same(self, answer: Answer, expect: Answer) -> bool:
        """Returns true if an answer is the expected one.

        In bfloat16 the kernels for one token and for many tokens differ by rounding. So there, the texts may part at a
        place where both tokens are about equally probable. Before this place, probabilities must be about equal, too.
        """
        if not self.near:
            return answer.token_ids == expect.token_ids
        for place, (own, right) in enumerate(zip(answer.top, expect.top, strict=True)):
            token, best = (f"token_id:{each.token_ids[place]}" for each in (answer, expect))
            if abs(own[token] - right.get(token, -99.0)) > self.near:
                return False
            if token != best:
                return right[best] - right[token] <= self.near
        return True


LAYER = 2 * 2 * 32 * 4  # K and V of two heads of size 32, in float32
MAMBA2 = (3 * 288 + 8 * 32 * 16) * 4
GDN = (3 * 1024 + 4 * 128 * 128) * 2
NEAR = 0.3
NO_CACHE = ("--no-enable-prefix-caching",)
QWEN3_NEXT = Kind("qwen3-next", LAYER // 2, state=3 * GDN, groups=4, near=NEAR, dtype="bfloat16")
GPT_OSS = Kind("gpt-oss", 2 * LAYER, window=2 * LAYER)
KINDS = {
    "gpt-oss": GPT_OSS,
    "gpt-oss-older": replace(GPT_OSS, older=True),
    "gemma3": Kind("gemma3", LAYER, window=3 * LAYER, groups=4),
    # Two layers have KV of their own, and heads of full attention are twice as large.
    "gemma4": Kind("gemma4", 2 * LAYER, window=LAYER),
    "mistral": Kind("mistral", 0, window=4 * LAYER, groups=1),
    "qwen3-moe": Kind("qwen3-moe", 4 * LAYER, groups=1),
    # vLLM's kernel for Mamba 2 on CPUs has no states for a prefix cache.
    "granite4": Kind("granite4", LAYER, state=3 * MAMBA2, groups=4, more=NO_CACHE),
    "qwen3-next": QWEN3_NEXT,
    "qwen3-next-uncached": replace(QWEN3_NEXT, more=NO_CACHE),
}


@dataclass
class Side:
    """A pair, a plain instance and the model that both serve."""

    kind: Kind
    pair: Pair
    reference: Reference
    spoil: Path

    @property
    def is_cached(self) -> bool:
        """True if the engines have a prefix cache."""
        return not self.kind.more

    @property
    def block_tokens(self) -> int:
        """The number of tokens of a block of the decode engine's prefix cache; any number without a cache."""
        return self.pair.decode.block_tokens() if self.is_cached else 64

    def expect(self, tokens: list[int]) -> Answer:
        return self.reference.answer(tokens, max_tokens=TOKENS, **TOP)

    def move(self, tokens: list[int], *, cached: int = 0, max_tokens: int = TOKENS) -> list[int]:
        """Hands a prompt over. Asserts that the text is right, that the KV moved as computed, and that the decode side
        computed one token. Returns the answer's tokens.
        """
        moved = self.pair.move(tokens, max_tokens=max_tokens, **TOP)
        expect = self.reference.answer(tokens, max_tokens=max_tokens, **TOP)
        assert self.kind.is_same(moved.answer, expect), (len(tokens), moved.answer, expect)
        resumed = len(tokens) - self.kind.last
        assert (moved.tokens.cached, moved.tokens.external) == (cached, resumed - cached), (len(tokens), moved.tokens)
        assert moved.tokens.computed == self.kind.last, moved.tokens
        for record in (moved.sender, moved.receiver):
            assert (record["reason"], record["have_tokens"]) == (None, cached), record
            assert record["bytes"] == self.kind.bytes(resumed, cached), (len(tokens), record)
        return moved.answer.token_ids


MODELS = ("gemma3", "gemma4", "mistral", "qwen3-moe", "qwen3-next-uncached", "gpt-oss-older")
FURTHER = [pytest.param(name, marks=pytest.mark.models) for name in MODELS]


@pytest.fixture(scope="module", params=["gpt-oss", "granite4", "qwen3-next", *FURTHER])
def side(request: pytest.FixtureRequest, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """Starts the pair and the plain instance of one model."""
    kind = KINDS[request.param]
    model = write_hybrid(ROOT / "target" / "hybrids" / kind.name, kind.name)
    spoil = tmp_path_factory.mktemp("spoil") / "group"
    more = ("--dtype", kind.dtype, "--kv-cache-memory-bytes", str(256 << 20), *kind.more)
    plain = Engine(EngineOptions("plain " + request.param, model, forked=True, more=(*NO_CACHE, *more)), logs)
    options = PairOptions(
        model,
        logs,
        forked=True,
        prefix=request.param + "-",
        more=more,
        buffer_bytes=64 * CHUNK_TOKENS * (kind.full + kind.window) + 8 * kind.state,
        sidecar_keys={"park_ms": 3000, "fetch_port": 0},
        prefill_module="harness.older" if kind.older else "pd_sidecar.connector",
        decode_module="harness.older" if kind.older else "harness.spoiled",
        connector={"allow_several_groups": True} if kind.older else {},
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
    for n in (2, 63, 64, 65, 66, 97, 128, 129, 257, 513, 1001):
        side.move(prompt(n, seed=1000 + n))


@pytest.mark.own_engines
@pytest.mark.models
def test_each_residue_of_the_block_size(side: Side) -> None:
    for n in range(130, 194):
        side.move(prompt(n, seed=3000 + n), max_tokens=4)


@pytest.mark.own_engines
def test_the_text_depends_on_each_group(side: Side) -> None:
    tokens = prompt(300, seed=1)
    # The loss of a group changes probabilities by more than a third of what rounding may change in a long answer.
    strict = replace(side.kind, near=side.kind.near / 3)
    try:
        for group in range(side.kind.groups):
            side.spoil.write_text(str(group))
            side.pair.reset_prefix_caches()
            answer = side.pair.move(tokens, max_tokens=TOKENS, **TOP).answer
            assert not strict.is_same(answer, side.expect(tokens)), group
    finally:
        side.spoil.unlink()


@pytest.mark.own_engines
@pytest.mark.parametrize("lost", ["state", "tokens"])
@pytest.mark.parametrize("side", ["granite4"], indirect=True)
def test_a_load_that_fails_in_its_middle_is_computed_again(side: Side, lost: str) -> None:
    """The tokens have arrived and the state has not, or the reverse."""
    tokens = prompt(700, seed=8)
    before = side.pair.decode.prompt_tokens()
    side.spoil.write_text(lost)
    try:
        answer = side.pair.complete(tokens, max_tokens=TOKENS, **TOP)
    finally:
        side.spoil.unlink()
    assert side.kind.is_same(answer, side.expect(tokens)), answer
    spent = side.pair.prompt_tokens_since(before, len(tokens))
    assert (spent.external, spent.computed) == (0, len(tokens)), spent
    side.move(tokens)


@pytest.mark.own_engines
def test_eight_at_once(side: Side) -> None:
    prompts = [prompt(150 + 97 * i, seed=2000 + i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda tokens: side.pair.complete(tokens, max_tokens=TOKENS, **TOP), prompts))
    for tokens, answer in zip(prompts, answers, strict=True):
        assert side.kind.is_same(answer, side.expect(tokens)), len(tokens)
        record = side.pair.receiver.record(answer.headers["x-request-id"])
        assert (record["reason"], record["bytes"]) == (None, side.kind.bytes(len(tokens) - side.kind.last)), record


@pytest.mark.own_engines
def test_a_second_turn_moves_only_what_is_new(side: Side) -> None:
    """The decode side has whole blocks of the first turn. It has states of the first turn only at some block ends, but
    the state that arrives replaces them.
    """
    block = side.block_tokens
    # vLLM keeps a window in its cache only at the last block's end in the prompt. There the decode side has the whole
    # window only if the loaded tokens end there, too.
    said = prompt(block + 1, seed=3)
    for turn in range(3):
        answer = side.move(said, cached=turn * block if side.is_cached else 0)
        said = said + answer + prompt(block - TOKENS, seed=30 + turn)


@pytest.mark.own_engines
def test_a_block_that_was_filled_in_part_is_not_used_again(side: Side) -> None:
    """A load fills the first block of a window only from the window's begin. A prompt that shares the tokens up to this
    block's end needs the other tokens, too.
    """
    block = side.block_tokens
    first = prompt(3 * block - 1, seed=4)
    side.move(first)
    shared = 0 if side.kind.window or not side.is_cached else 2 * block
    side.move(first[: 2 * block] + prompt(70, seed=5), cached=shared)


@pytest.mark.own_engines
def test_a_router_that_names_no_receiver(side: Side) -> None:
    pair = side.pair
    for n in (2, 64, 129, 300, 1001):
        tokens = prompt(n, seed=5000 + n)
        before = pair.decode.prompt_tokens()
        told = prefill_leg(pair.prefill, tokens)
        # The sidecars know the request by the decode engine's id.
        with pair.receiver.recorded() as records:
            answer = complete(pair.decode.url, tokens, max_tokens=TOKENS, kv_transfer_params=told, **TOP)
        assert side.kind.is_same(answer, side.expect(tokens)), n
        spent = pair.prompt_tokens_since(before, n)
        last = side.kind.last
        assert (spent.cached, spent.external, spent.computed) == (0, n - last, last), spent
        (record,) = records
        assert (record["reason"], record["bytes"]) == (None, side.kind.bytes(n - last)), record
    # An idle engine frees the blocks of fetched KV with its next step.
    pair.prefill.warm_up()


@pytest.mark.own_engines
@pytest.mark.parametrize(
    "side", ["gpt-oss", "granite4", pytest.param("mistral", marks=pytest.mark.models)], indirect=True
)
def test_sequences_of_one_prompt_share_one_copy(side: Side) -> None:
    pair = side.pair
    for n in (40, 300):
        tokens = prompt(n, seed=7000 + n)
        request = {
            "model": "m", "prompt": tokens, "n": SEQUENCES, "temperature": 1.0, "seed": 5, "max_tokens": TOKENS,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        before = pair.decode.prompt_tokens()
        with pair.receiver.recorded() as records:
            answer, expect = (
                [choice["token_ids"] for choice in post_json(f"{url}/v1/completions", request)["choices"]]
                for url in (pair.proxy.url, side.reference.engine.url)
            )
        assert len(set(map(tuple, expect))) == SEQUENCES, "equal sequences prove nothing"
        assert answer == expect, n
        spent = pair.prompt_tokens_since(before, SEQUENCES * n)
        assert (spent.external, spent.computed) == (SEQUENCES * (n - 1), SEQUENCES), spent
        (record,) = records
        assert (record["reason"], record["bytes"]) == (None, side.kind.bytes(n - 1)), record


@pytest.mark.own_engines
@pytest.mark.parametrize("side", ["gpt-oss", "granite4"], indirect=True)
def test_the_first_token_from_the_prefill_engine(side: Side) -> None:
    """The prefill side computes the whole prompt, and the decode side resumes after it."""
    pair, gave = side.pair, 0
    with pair.proxy.flags("--first-token", "prefill"):
        pair.wait_sidecars()
        for n in (2, 64, 65, 128, 129, 300, 513, 600):
            tokens = prompt(n, seed=6000 + n)
            before = pair.decode.prompt_tokens()
            with pair.proxy.recorded() as records:
                text = streamed(pair.proxy.url, tokens)
            assert text == streamed(side.reference.engine.url, tokens), n
            spent = pair.prompt_tokens_since(before, n)
            given = spent.external + spent.cached + spent.computed - n
            if given:
                assert (spent.external, spent.computed) == (n, 1), (n, spent)
                record = pair.proxy.record(records[0]["id"], moved=True)
                assert record["moved"]["bytes"] == side.kind.bytes(n), (n, record)
            else:
                # The first token is half a character, so the decode side gives it. The decode side computes the prompt,
                # because the window or the state of the prefill side is one token too far.
                assert (spent.external, spent.computed) == (0, n), (n, spent)
            gave += given
    pair.wait_sidecars()
    assert gave, "no first token could be shown by itself"


@pytest.mark.own_engines
@pytest.mark.parametrize("victim", ["sender", "receiver"])
@pytest.mark.parametrize("side", ["granite4", pytest.param("gpt-oss-older", marks=pytest.mark.models)], indirect=True)
def test_a_killed_sidecar_never_changes_a_text(side: Side, victim: str) -> None:
    pair, sidecar = side.pair, getattr(side.pair, victim)
    with Traffic(pair, clients=4, seed=71 if victim == "sender" else 72, bound_s=BOUND_S) as traffic:
        traffic.wait_for(6)
        killed = time.monotonic()
        sidecar.kill()
        traffic.wait_for(6)
        sidecar.start()
        pair.wait_sidecars()
        back = time.monotonic()
        traffic.wait_for(6)
    for result in traffic.results:
        if result.answer is not None:
            expect = side.reference.token_ids(result.prompt, max_tokens=len(result.answer.token_ids))
            assert result.answer.token_ids == expect, len(result.prompt)
        else:
            assert result.began + result.seconds >= killed and result.began <= back, result.error
    pair.wait_empty()
    side.move(prompt(700, seed=73))


def streamed(url: str, tokens: list[int]) -> str:
    """Returns the text of a stream that asks for nothing else."""
    body = {"prompt": tokens, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    with Stream(f"{url}/v1/completions", body) as stream:
        return "".join(choice["text"] for event in stream for choice in event["choices"])
