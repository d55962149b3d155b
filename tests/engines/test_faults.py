"""Kills each part with `kill -9` while several clients send requests."""

from __future__ import annotations

import time
from http.client import HTTPException

import pytest
from harness.client import HttpError, Stream
from harness.engine import wait_for
from harness.pair import Pair
from harness.prompts import prompt
from harness.reference import Reference
from harness.traffic import Traffic

# Every request ends within this time, whichever part is killed. In the slowest case a decode engine computes a prompt
# after a failed transfer, on two busy cores. The longest wait in this case is `no_sender_ms`, 5 s.
BOUND_S = 60.0

# Time from the restart of a proxy until the proxy knows both instances again.
REGISTERED_S = 20.0

CLIENTS = 4

# Number of requests before the kill, and after each change.
SOME = 6


def check(traffic: Traffic, reference: Reference, killed: float, back: float) -> None:
    """Asserts that each request ended in time with the right text. Errors may occur only while a part was down."""
    slowest = max(result.seconds for result in traffic.results)
    assert slowest < BOUND_S
    wrong = [
        len(result.prompt)
        for result in traffic.results
        if result.answer is not None
        and result.answer.token_ids != reference.token_ids(result.prompt, max_tokens=len(result.answer.token_ids))
    ]
    assert not wrong, f"wrong texts for prompts of {wrong} tokens"
    without_cause = [
        result.error
        for result in traffic.results
        if result.error and (result.began + result.seconds < killed or result.began > back)
    ]
    assert not without_cause


def check_transfers_again(pair: Pair, reference: Reference, seed: int) -> None:
    """Checks that requests are moved again after the killed part is back, without another restart."""
    pair.wait_sidecars()
    pair.wait_empty()
    tokens = prompt(700, seed=seed)
    pair.move(tokens).check(reference.token_ids(tokens), len(tokens))


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_kill_sidecar(pair: Pair, reference: Reference, victim: str) -> None:
    sidecar = getattr(pair, victim)
    other = pair.receiver if victim == "sender" else pair.sender
    survivors = [part.pid for part in (pair.prefill, pair.decode, other, pair.proxy)]
    with Traffic(pair, clients=CLIENTS, seed=31 if victim == "sender" else 32, bound_s=BOUND_S) as traffic:
        traffic.wait_for(SOME)
        killed = time.monotonic()
        sidecar.kill()
        traffic.wait_for(SOME)
        sidecar.start()
        pair.wait_sidecars()
        back = time.monotonic()
        traffic.wait_for(SOME)
    check(traffic, reference, killed, back)
    check_transfers_again(pair, reference, seed=33)
    assert survivors == [part.pid for part in (pair.prefill, pair.decode, other, pair.proxy)]


def test_kill_proxy(pair: Pair, reference: Reference) -> None:
    """The clients lose their connections, and the engines drop the requests. A new proxy then finds both engines."""
    request = {"prompt": prompt(300, seed=34), "max_tokens": 1500, "ignore_eos": True, "stream": True}
    generated = pair.decode.generated_tokens()
    with Stream(f"{pair.proxy.url}/v1/completions", request) as stream:
        next(iter(stream))
        pair.proxy.kill()
        with pytest.raises((HttpError, OSError, HTTPException)):
            list(stream)
    pair.wait_engines_idle()
    # The engine has dropped the request before its end.
    assert pair.decode.generated_tokens() - generated < 1400
    pair.proxy.start()
    pair.proxy.wait_ready(REGISTERED_S)
    check_transfers_again(pair, reference, seed=35)


def test_kill_prefill_engine(pair: Pair, reference: Reference) -> None:
    with Traffic(pair, clients=CLIENTS, seed=36, bound_s=BOUND_S) as traffic:
        traffic.wait_for(SOME)
        killed = time.monotonic()
        pair.prefill.kill()
        traffic.wait_for(SOME)  # computed by the decode engine alone
        assert pair.sender.running
        assert pair.receiver.running
    # Check this before the restart: the slots of a dead engine become free without a new engine.
    pair.sender.wait_empty()
    pair.receiver.wait_empty()
    # The decode engine runs and can compute every prompt. So only requests that were in flight at the kill may fail.
    check(traffic, reference, killed, killed)
    pair.prefill.start()
    wait_for([pair.prefill])
    check_transfers_again(pair, reference, seed=37)
