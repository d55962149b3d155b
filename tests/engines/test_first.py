"""Tests one request through two real engines, two sidecars and the proxy."""

from __future__ import annotations

from harness.pair import Pair
from harness.prompts import prompt
from harness.reference import Reference


def test_one_request(pair: Pair, reference: Reference) -> None:
    tokens = prompt(300, seed=0)
    pair.move(tokens).check(reference.token_ids(tokens), len(tokens))
