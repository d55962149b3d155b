"""Hands over a model with a draft (EAGLE) whose KV has another shape. Both engines have the draft, or only the decode
engine has it.

A draft does not change a text, but without its KV it makes other guesses. So the tests also count the guesses that the
model accepts.
"""

from __future__ import annotations

import contextlib
import json
import time
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
BOUND_S = 60.0
LENGTHS = (33, 64, 65, 200, 257, 300, 513, 1001)
# The number of the draft's layers among the layout's groups.
DRAFT_GROUP = 1


@dataclass
class Drafted:
    """A pair, and a plain instance, all with the same draft."""

    pair: Pair
    reference: Reference
    spoil: Path
    token_bytes: int
    """The bytes of a token that move."""

    def accepted(self, lengths: tuple[int, ...], seed: int) -> tuple[list[int], list[int]]:
        """Hands prompts over, and checks the texts and what moved. Returns for each prompt the number of guesses that
        the decode engine and the plain instance accepted.
        """
        ours: list[int] = []
        plain: list[int] = []
        for n in lengths:
            tokens = prompt(n, seed=seed)
            with counted(self.pair.decode, ours):
                moved = self.pair.move(tokens, max_tokens=TOKENS)
            with counted(self.reference.engine, plain):
                assert moved.answer.token_ids == self.reference.token_ids(tokens, max_tokens=TOKENS), n
            check_tokens(moved.tokens, n)
            for record in (moved.sender, moved.receiver):
                assert (record["reason"], record["bytes"]) == (None, n * self.token_bytes), record
        return ours, plain


@contextlib.contextmanager
def counted(engine: Engine, counts: list[int]) -> Iterator[None]:
    """Appends the number of guesses that the engine accepts inside the block. The block ends with an answer, and the
    engine has counted its steps when the request has left it.
    """
    before = guesses(engine)
    yield
    deadline = time.monotonic() + BOUND_S
    while engine.requests():
        assert time.monotonic() < deadline, engine.options.name
        time.sleep(0.02)
    counts.append(guesses(engine) - before)


def guesses(engine: Engine) -> int:
    return int(engine.metrics().sum("vllm:spec_decode_num_accepted_tokens"))


BOTH, ALONE = "both sides", "decode alone"


@pytest.fixture(scope="module", params=[BOTH, pytest.param(ALONE, marks=pytest.mark.models)])
def drafted(request: pytest.FixtureRequest, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drafted]:
    is_alone = request.param == ALONE
    token_bytes = TARGET_BYTES + (0 if is_alone else DRAFT_BYTES)
    target = write_target(ROOT / "target" / "drafts" / "target")
    draft = write_draft(ROOT / "target" / "drafts" / "draft")
    speculation = {"method": "eagle", "model": str(draft), "num_speculative_tokens": GUESSES}
    more = ("--kv-cache-memory-bytes", str(256 << 20))
    with_draft = ("--speculative-config", json.dumps(speculation))
    spoil = tmp_path_factory.mktemp("spoil") / "group"
    plain = Engine(
        EngineOptions("plain drafted", target, forked=True, more=("--no-enable-prefix-caching", *more, *with_draft)),
        logs,
    )
    options = PairOptions(
        target,
        logs,
        forked=True,
        prefix="drafted-",
        more=more if is_alone else (*more, *with_draft),
        decode_more=with_draft if is_alone else (),
        connector={"move_draft": False} if is_alone else {},
        buffer_bytes=64 * CHUNK_TOKENS * token_bytes,
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
        yield Drafted(pair, Reference(plain), spoil, token_bytes)


@pytest.fixture(autouse=True)
def fresh(drafted: Drafted) -> Iterator[None]:
    drafted.pair.reset_prefix_caches()
    yield
    drafted.pair.wait_empty()


@pytest.mark.own_engines
@pytest.mark.parametrize("drafted", [BOTH], indirect=True)
def test_the_draft_of_another_shape_guesses_as_well_as_without_a_hand_over(drafted: Drafted) -> None:
    ours, plain = drafted.accepted(LENGTHS, seed=900)
    assert sum(plain) > TOKENS
    assert ours == plain


@pytest.mark.own_engines
@pytest.mark.parametrize("drafted", [BOTH], indirect=True)
def test_without_its_kv_the_draft_makes_other_guesses(drafted: Drafted) -> None:
    drafted.spoil.write_text(str(DRAFT_GROUP))
    try:
        ours, plain = drafted.accepted(LENGTHS[-4:], seed=900)
    finally:
        drafted.spoil.unlink()
    assert ours != plain


@pytest.mark.own_engines
@pytest.mark.models
@pytest.mark.parametrize("drafted", [ALONE], indirect=True)
def test_a_draft_on_the_decode_side_alone_stays_out_of_the_transfer(drafted: Drafted) -> None:
    ours, plain = drafted.accepted(LENGTHS, seed=902)
    assert sum(ours) > 0
    assert sum(plain) > TOKENS
