"""Tests that the proxy answers hundreds of requests as one plain vLLM answers them, except for ids, times and the
differences of `docs/proxy/differences.md`.
"""

from __future__ import annotations

import os

import pytest
from harness.differential.allowed import ALLOWED, reason
from harness.differential.cases import CASES
from harness.differential.run import Outcome, ask_both
from harness.pair import Pair
from harness.reference import Reference

# A failure shows so many differences: one fault may show in hundreds of cases.
SHOWN = 40


@pytest.mark.skipif(os.environ.get("PD_TEST_DIFFERENTIAL") != "1", reason="on demand: PD_TEST_DIFFERENTIAL=1")
def test_the_proxy_answers_as_one_vllm(pair: Pair, reference: Reference) -> None:
    cases = [case for case in CASES if case.quick or os.environ.get("PD_TEST_LONG") == "1"]
    moving = [case for case in cases if case.alone is None and not case.single]
    others = [case for case in cases if case.alone is not None and not case.single]
    # vLLM 0.32 with adapters on the CPU ends if other requests are in the batch of a request with log probabilities of
    # the prompt or with beam search. And requests of an adapter change the texts of others in their batch.
    single = [case for case in cases if case.single]
    before = pair.decode.prompt_tokens()
    outcomes = ask_both(moving, reference.engine.url, pair.proxy)
    handed_over = [outcome for outcome in outcomes if outcome.record is not None]
    sequences = sum(outcome.sequences() for outcome in handed_over)
    tokens = pair.prompt_tokens_since(before, 1)
    outcomes += ask_both(others, reference.engine.url, pair.proxy)
    outcomes += ask_both(single, reference.engine.url, pair.proxy, at_once=1)

    assert len(outcomes) >= 300
    assert not (different := unexplained(outcomes)), "\n".join([f"{len(different)} differences", *different[:SHOWN]])
    # An entry that no case needs hides the next fault.
    assert not (idle := [allowed.what for allowed in ALLOWED if not allowed.is_used(outcomes)]), idle
    # Equal answers alone would also come from a decode engine that computes every prompt.
    assert len(handed_over) >= 200
    assert not (wrong := [text for outcome in outcomes if (text := outcome.wrong_way())]), "\n".join(wrong)
    assert tokens.computed <= sequences, (tokens, sequences)
    assert tokens.external > 0


def unexplained(outcomes: list[Outcome]) -> list[str]:
    """Returns the differences that no entry of the list allows."""
    return [
        f"{outcome.case.name}: {difference}"
        for outcome in outcomes
        for difference in outcome.differences()
        if reason(outcome.case, difference) is None
    ]
