"""`kill -9` of each part in the middle of a stream of requests."""

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

# Every request ends within this time, whatever dies under it: the answer of a decode engine that computes a prompt
# after the transfer was given up, on two busy cores. The longest wait inside is `no_sender_ms`, 5 s.
BOUND_S = 20.0

# From a proxy's return until it knows both instances again.
REGISTERED_S = 3.0

CLIENTS = 4

# Requests before the kill, and after each change.
SOME = 6


def check(traffic: Traffic, reference: Reference, killed: float, back: float) -> None:
    """Every request ended in time, with the right text, or with a clean error if something was dead meanwhile."""
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
    """With the killed part back, and nothing else restarted."""
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
    """Its clients lose their connections; the engines lose their requests and hold nothing; a new one is found."""
    request = {"prompt": prompt(300, seed=34), "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with Stream(f"{pair.proxy.url}/v1/completions", request) as stream:
        next(iter(stream))
        pair.proxy.kill()
        began = time.monotonic()
        with pytest.raises((HttpError, OSError, HTTPException)):
            list(stream)
    pair.wait_engines_idle()
    # The answer would have taken longer: it was given up.
    assert time.monotonic() - began < 5.0
    pair.proxy.start()
    returned = time.monotonic()
    pair.proxy.wait_ready(REGISTERED_S)
    assert time.monotonic() - returned < REGISTERED_S
    check_transfers_again(pair, reference, seed=35)


def test_kill_prefill_engine(pair: Pair, reference: Reference) -> None:
    with Traffic(pair, clients=CLIENTS, seed=36, bound_s=BOUND_S) as traffic:
        traffic.wait_for(SOME)
        killed = time.monotonic()
        pair.prefill.kill()
        traffic.wait_for(SOME)  # computed by the decode engine alone
        assert pair.sender.running
        assert pair.receiver.running
    # Before the restart: what the dead engine held is given back without it.
    pair.sender.wait_empty()
    pair.receiver.wait_empty()
    # The decode engine is alive and can compute everything: only requests under way may fail.
    check(traffic, reference, killed, killed)
    pair.prefill.start()
    wait_for([pair.prefill])
    check_transfers_again(pair, reference, seed=37)
