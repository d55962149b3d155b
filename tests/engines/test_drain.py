"""Tests SIGTERM: the process ends its requests in flight first, and then exits with code 0."""

from __future__ import annotations

import signal

import pytest
from harness.pair import Pair
from harness.prompts import prompt
from harness.reference import Reference
from harness.traffic import Traffic

BOUND_S = 60.0


@pytest.mark.parametrize("which", ["sender", "receiver"])
def test_sidecar_under_load(pair: Pair, reference: Reference, which: str) -> None:
    sidecar = getattr(pair, which)
    with Traffic(pair, clients=3, seed=91, bound_s=BOUND_S) as traffic:
        traffic.wait_for(5)
        process = sidecar.process
        assert process is not None
        process.signal(signal.SIGTERM)
        assert process.wait(BOUND_S) == 0, process.tail()
        sidecar.start()
        pair.wait_sidecars()
        traffic.wait_for(5)
    for result in traffic.results:
        assert result.seconds < BOUND_S
        if result.answer is not None:
            assert result.answer.token_ids == reference.token_ids(result.prompt, max_tokens=16)


def test_idle_sidecars_end_at_once(pair: Pair) -> None:
    for sidecar in (pair.sender, pair.receiver):
        assert sidecar.process is not None
        sidecar.process.signal(signal.SIGTERM)
        # The drain of a sidecar that is not idle ends after 10 s.
        assert sidecar.process.wait(9.0) == 0, sidecar.process.tail()
    pair.restore()


def test_proxy_lets_answers_finish(pair: Pair, reference: Reference) -> None:
    tokens = prompt(300, seed=92)
    expect = reference.token_ids(tokens, max_tokens=200)
    process = pair.proxy.process
    assert process is not None
    told: list[str] = []

    def tell(_: str) -> None:
        if not told:
            told.append("once")
            process.signal(signal.SIGTERM)

    answer = pair.complete(tokens, max_tokens=200, on_text=tell)
    assert answer.token_ids == expect
    assert process.wait(BOUND_S) == 0, process.tail()
    pair.proxy.start()
    pair.wait_sidecars()
