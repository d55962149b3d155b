"""Tests receive buffers that are too small."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from harness.model import KV_BYTES_PER_TOKEN
from harness.pair import CHUNK_BYTES, Pair
from harness.prompts import prompt
from harness.reference import Reference

LONG = 1500
CHUNKS = 6  # number of chunks in a prompt of 1500 tokens

# Time for sixteen answers on two cores, if an engine computes half of these prompts itself.
BOUND_S = 120.0


def test_prompt_through_two_slots(pair: Pair, reference: Reference) -> None:
    pair.restart_sidecars(landing_bytes=2 * CHUNK_BYTES)
    tokens = prompt(LONG, seed=41)
    moved = pair.move(tokens)
    moved.check(reference.token_ids(tokens), LONG)
    assert moved.receiver["chunks"] == CHUNKS
    assert moved.receiver["windowed"] == CHUNKS - 2
    assert sum(pair.receiver.slots()) == 2


def test_sixteen_clients_room_for_one(pair: Pair, reference: Reference) -> None:
    pair.restart_sidecars(landing_bytes=CHUNKS * CHUNK_BYTES)
    prompts = [prompt(LONG, seed=420 + client) for client in range(16)]
    before = pair.decode.prompt_tokens()
    with ThreadPoolExecutor(max_workers=16) as pool:
        answers = list(pool.map(lambda tokens: pair.complete(tokens, timeout_s=BOUND_S), prompts))
    expect = [reference.token_ids(tokens) for tokens in prompts]
    assert [answer.token_ids for answer in answers] == expect

    records = [pair.sender.record(answer.headers["x-request-id"]) for answer in answers]
    moved = [record for record in records if record["reason"] is None]
    assert {record["reason"] for record in records} <= {None, "no_room"}
    # On a slow machine more requests wait in vain for the time of an allocation.
    assert len(moved) >= 4
    assert all(record["bytes"] == LONG * KV_BYTES_PER_TOKEN for record in moved)

    # The decode engine's own counters must show that it computed only the prompts whose KV was not moved.
    tokens = pair.prompt_tokens_since(before, 16 * LONG)
    refused = 16 - len(moved)
    assert tokens.external >= len(moved) * (LONG - 1)
    assert tokens.computed <= refused * LONG + len(moved)
