"""The checks of this suite notice when nothing is moved: equal text alone would not show it."""

from __future__ import annotations

import pytest
from harness.pair import Pair
from harness.prompts import prompt
from harness.reference import Reference


def test_without_pushes_the_checks_fail(pair: Pair, reference: Reference) -> None:
    pair.restart_sidecars(no_push=True)
    tokens = prompt(700, seed=71)
    moved = pair.move(tokens)
    assert moved.answer.token_ids == reference.token_ids(tokens), "the decode engine computes what does not come"
    with pytest.raises(AssertionError):
        moved.check(reference.token_ids(tokens), len(tokens))
    assert moved.sender["bytes"] == 0
    assert moved.tokens.external == 0
