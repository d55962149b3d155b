"""Tests that the proxy answers hundreds of requests as one plain vLLM answers them, except for ids, times and the
differences of `docs/proxy/differences.md`.
"""

from __future__ import annotations

import os

from harness.differential.allowed import ALLOWED, reason
from harness.differential.cases import CASES
from harness.differential.report import table
from harness.differential.run import Outcome, ask_both
from harness.pair import Pair
from harness.reference import Reference
from harness.sidecar import ROOT

# A failure shows so many differences: one fault may show in hundreds of cases.
SHOWN = 40

# The short suite sends every third case, and needs no further engines.
STEP = 3
LEAST = 300

# Share of the requests whose hand-over may be late, and is repeated alone.
LATE = 0.1

RESULTS = ROOT / "target" / "differential.md"


def test_the_proxy_answers_as_one_vllm(pair: Pair, reference: Reference) -> None:
    is_whole = os.environ.get("PD_TEST_DIFFERENTIAL") == "1"
    cases = CASES if is_whole else CASES[::STEP]
    moving = [case for case in cases if case.alone is None and not case.single]
    others = [case for case in cases if case.alone is not None and not case.single]
    # docs/proxy/differences.md names the faults of vLLM 0.32 for which these requests have to run alone.
    single = [case for case in cases if case.single]
    before = pair.decode.prompt_tokens()
    outcomes = ask_both(moving, reference.engine.url, pair.proxy)
    handed_over = [outcome for outcome in outcomes if outcome.record is not None]
    sequences = sum(outcome.sequences() for outcome in handed_over)
    tokens = pair.prompt_tokens_since(before, 1)
    outcomes += ask_both(others, reference.engine.url, pair.proxy)
    outcomes += ask_both(single, reference.engine.url, pair.proxy, at_once=1)
    if is_whole:
        RESULTS.write_text(table(outcomes, tokens))

    assert len(outcomes) >= LEAST
    assert not (different := unexplained(outcomes)), "\n".join([f"{len(different)} differences", *different[:SHOWN]])
    if is_whole:
        # An entry that no case needs hides the next fault.
        assert not (idle := [allowed.what for allowed in ALLOWED if not allowed.is_used(outcomes)]), idle
    # Equal answers alone would also come from a decode engine that computes every prompt.
    assert len(handed_over) >= LEAST // STEP
    late = [outcome for outcome in outcomes if outcome.wrong_way()]
    assert len(late) <= LATE * len(handed_over), "\n".join(str(outcome.wrong_way()) for outcome in late)
    # On a busy machine a wait may pass its bound, and the decode engine then computes the prompt. Alone, each of these
    # requests must take its way.
    pair.reset_prefix_caches()
    again = ask_both([outcome.case for outcome in late], reference.engine.url, pair.proxy, at_once=1)
    assert not (wrong := [text for outcome in again if (text := outcome.wrong_way())]), "\n".join(wrong)
    assert late or tokens.computed <= sequences, (tokens, sequences)
    assert tokens.external > 0


def unexplained(outcomes: list[Outcome]) -> list[str]:
    """Returns the differences that no entry of the list allows."""
    return [
        f"{outcome.case.name}: {difference}"
        for outcome in outcomes
        for difference in outcome.differences()
        if reason(outcome.case, difference) is None
    ]
