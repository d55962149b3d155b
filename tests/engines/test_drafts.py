"""Hands over a model with a draft (EAGLE) whose KV has another shape. Both engines have the draft.

A wrong draft does not change a text, but the model then refuses more of the draft's tokens. So the tests also count the
accepted tokens.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.drafts import DRAFT_BYTES, TARGET_BYTES, write_draft, write_target
from harness.engine import Engine, EngineOptions, wait_for
from harness.pair import Pair, PairOptions, check_tokens, pair_of
from harness.process import ended_by_signals
from harness.progress import Progress
from harness.prompts import prompt
from harness.reference import Reference
from harness.sidecar import CHUNK_TOKENS, ROOT

TOKENS, GUESSES = 32, 3
LENGTHS = (33, 64, 65, 200, 257, 300, 513, 1001)
TOKEN_BYTES = TARGET_BYTES + DRAFT_BYTES
# The number of the draft's layers among the layout's groups.
DRAFT_GROUP = 1


@dataclass
class Drafted:
    """A pair, and a plain instance, all with the same draft."""

    pair: Pair
    reference: Reference
    spoil: Path

    def accepted(self, lengths: tuple[int, ...], seed: int) -> tuple[int, int]:
        """Hands prompts over, and checks the texts and what moved. Returns the numbers of guesses that the decode
        engine and the plain instance accepted.
        """
        engines = (self.pair.decode, self.reference.engine)
        before = [guesses(engine) for engine in engines]
        for n in lengths:
            tokens = prompt(n, seed=seed)
            moved = self.pair.move(tokens, max_tokens=TOKENS)
            assert moved.answer.token_ids == self.reference.token_ids(tokens, max_tokens=TOKENS), n
            check_tokens(moved.tokens, n)
            for record in (moved.sender, moved.receiver):
                assert (record["reason"], record["bytes"]) == (None, n * TOKEN_BYTES), record
        counts = [guesses(engine) - count for engine, count in zip(engines, before, strict=True)]
        return counts[0], counts[1]


def guesses(engine: Engine) -> int:
    return int(engine.metrics().sum("vllm:spec_decode_num_accepted_tokens"))


@pytest.fixture(scope="module")
def drafted(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drafted]:
    target = write_target(ROOT / "target" / "drafts" / "target")
    draft = write_draft(ROOT / "target" / "drafts" / "draft")
    speculation = {"method": "eagle", "model": str(draft), "num_speculative_tokens": GUESSES}
    more = ("--speculative-config", json.dumps(speculation), "--kv-cache-memory-bytes", str(256 << 20))
    spoil = tmp_path_factory.mktemp("spoil") / "group"
    plain = Engine(
        EngineOptions("plain drafted", target, forked=True, more=("--no-enable-prefix-caching", *more)), logs
    )
    options = PairOptions(
        target,
        logs,
        forked=True,
        prefix="drafted-",
        more=more,
        buffer_bytes=64 * CHUNK_TOKENS * TOKEN_BYTES,
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
        yield Drafted(pair, Reference(plain), spoil)


@pytest.fixture(autouse=True)
def fresh(drafted: Drafted) -> Iterator[None]:
    drafted.pair.reset_prefix_caches()
    yield
    drafted.pair.wait_empty()


@pytest.mark.own_engines
def test_the_draft_of_another_shape_guesses_as_well_as_without_a_hand_over(drafted: Drafted) -> None:
    ours, plain = drafted.accepted(LENGTHS, seed=900)
    assert plain > TOKENS
    assert ours == plain


@pytest.mark.own_engines
def test_without_its_kv_the_draft_guesses_worse(drafted: Drafted) -> None:
    drafted.spoil.write_text(str(DRAFT_GROUP))
    try:
        ours, plain = drafted.accepted(LENGTHS, seed=901)
    finally:
        drafted.spoil.unlink()
    assert ours < plain
