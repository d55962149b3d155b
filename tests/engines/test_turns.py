"""Runs conversations of several turns: checks the bytes that each mode moves, and writes the time of each turn to a
file.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass

import pytest
from harness.client import post_json
from harness.model import KV_BYTES_PER_TOKEN
from harness.pair import Pair
from harness.prompts import prompt
from harness.reference import Reference
from harness.sidecar import ROOT

FIRST_TOKENS, NEW_TOKENS, ANSWER_TOKENS = 400, 100, 16


@dataclass(frozen=True)
class Turn:
    """One turn, with the measurements of its client and of the decode engine."""

    tokens: int
    first_ms: float
    total_ms: float
    moved_bytes: int
    cached_tokens: int


def converse(pair: Pair, reference: Reference, mode: str, turns: int, seed: int) -> list[Turn]:
    post_json(f"{pair.proxy.url}/mode/{mode}", {})
    post_json(f"{pair.proxy.url}/conversations/clear", {})
    said, seen = prompt(FIRST_TOKENS, seed=seed), []
    for turn in range(turns):
        if turn:
            said = said + prompt(NEW_TOKENS, seed=seed + turn)
        before = pair.decode.prompt_tokens()
        answer = pair.complete(said, max_tokens=ANSWER_TOKENS)
        assert answer.token_ids == reference.token_ids(said, max_tokens=ANSWER_TOKENS), (mode, turn)
        spent = pair.prompt_tokens_since(before, len(said))
        record = pair.proxy.record(answer.headers["x-request-id"], moved=True)
        moved = (record["moved"] or {}).get("bytes", 0)
        seen.append(Turn(len(said), answer.first_s * 1e3, answer.total_s * 1e3, moved, spent.cached))
        said = said + answer.token_ids
    return seen


@pytest.mark.parametrize("turns", [5, 10])
def test_conversation(pair: Pair, reference: Reference, turns: int) -> None:
    if turns > 5 and os.environ.get("PD_TEST_LONG") != "1":
        pytest.skip("on demand: PD_TEST_LONG=1")
    figures: dict[str, list[Turn]] = {}
    try:
        for number, mode in enumerate(("pd", "ppd", "auto")):
            pair.reset_prefix_caches()
            figures[mode] = converse(pair, reference, mode, turns, seed=1000 * turns + 100 * number)
            pair.wait_empty()
    finally:
        post_json(f"{pair.proxy.url}/mode/pd", {})
    text = json.dumps({mode: [asdict(turn) for turn in seen] for mode, seen in figures.items()}, indent=2)
    (ROOT / "target" / f"conversation-{turns}.json").write_text(text + "\n")

    def moved(mode: str) -> int:
        return sum(turn.moved_bytes for turn in figures[mode])

    # Every turn moves the KV of its new tokens and of the previous answer. A token's KV is moved twice only if the
    # token's block also contains new tokens.
    new = figures["pd"][-1].tokens * KV_BYTES_PER_TOKEN
    assert new * 0.9 <= moved("pd") <= 1.3 * new, (moved("pd"), new)
    assert moved("ppd") <= FIRST_TOKENS * KV_BYTES_PER_TOKEN * 1.1
    assert moved("auto") <= moved("pd") * 1.1
    for mode, seen in figures.items():
        for before, turn in itertools.pairwise(seen):
            assert turn.cached_tokens >= before.tokens - 64, (mode, turn)
