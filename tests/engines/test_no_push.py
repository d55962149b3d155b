"""Tests that the checks of this suite fail if no KV is moved. Equal texts alone do not show that KV was moved."""

from __future__ import annotations

import pytest
from harness.pair import Pair, check_tokens
from harness.prompts import prompt
from harness.reference import Reference


def test_without_pushes_the_checks_fail(pair: Pair, reference: Reference) -> None:
    pair.restart_sidecars(no_push=True)
    tokens = prompt(700, seed=71)
    before = pair.decode.prompt_tokens()
    answer = pair.complete(tokens)
    assert answer.token_ids == reference.token_ids(tokens), "the decode engine computes what does not come"
    used = pair.prompt_tokens_since(before, len(tokens))
    assert (used.external, used.computed) == (0, len(tokens))
    with pytest.raises(AssertionError):
        check_tokens(used, len(tokens))
    another = prompt(700, seed=72)
    with pytest.raises(AssertionError):
        pair.move(another).check(reference.token_ids(another), len(another))
    assert all(record["bytes"] == 0 for record in pair.sender.records())
