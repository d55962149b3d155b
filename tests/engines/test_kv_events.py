"""Tests that the proxy predicts what a real engine holds, from the engine's KV events, while the engine evicts blocks.

The test starts an engine of its own with a small cache, so that most requests evict blocks of earlier requests.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.client import complete, get_json
from harness.engine import Engine, EngineOptions, wait_for
from harness.metrics import PromptTokens
from harness.model import write_model
from harness.ports import free_port
from harness.prompts import prompt
from harness.proxy import Proxy
from harness.sidecar import ROOT

BLOCK = 32
# 2,560 tokens: eight prompts of 320 tokens.
BLOCKS = 80
# The prediction must be right for this share of the tokens.
LEAST = 0.95


@pytest.fixture
def fleet(logs: Path) -> Iterator[tuple[Engine, Proxy]]:
    port, replay = free_port(), free_port()
    events = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{port}",
        "replay_endpoint": f"tcp://*:{replay}",
    }
    more = ("--kv-events-config", json.dumps(events), "--num-gpu-blocks-override", str(BLOCKS))
    model = write_model(ROOT / "target" / "model")
    engine = Engine(EngineOptions("events engine", model, block_size=BLOCK, forked=True, more=more), logs)
    place = f"*=:{port}/{replay}"
    proxy = Proxy(logs, ["--decode", engine.url, "--decode-policy", "prefix", "--kv-events", place])
    try:
        engine.start()
        proxy.start()
        wait_for([engine])
        proxy._until("/ready", 60.0)
        yield engine, proxy
    finally:
        proxy.stop()
        engine.stop()


def spent_since(engine: Engine, before: PromptTokens) -> PromptTokens:
    """Returns the engine's counts of one request. The engine updates its counts a moment after the answer."""
    deadline = time.monotonic() + 60.0
    while not (spent := engine.prompt_tokens() - before).computed:
        assert time.monotonic() < deadline
    return spent


def test_predictions_are_right_after_evictions(fleet: tuple[Engine, Proxy]) -> None:
    engine, proxy = fleet
    draw = random.Random(7)
    # Conversations that share their first turn in groups of four, and texts.
    starts = [prompt(160, seed=group) for group in range(4)]
    ids = [[*starts[number % 4], *prompt(160, seed=100 + number)] for number in range(16)]
    texts = [f"{number} " + "prefill and decode " * (12 + number) for number in range(6)]
    right = wrong = cached = evicted = 0
    for turn in range(120):
        which = draw.randrange(len(ids) + len(texts))
        asked: list[int] | str = ids[which] if which < len(ids) else texts[which - len(ids)]
        before = engine.prompt_tokens()
        with proxy.recorded() as records:
            complete(proxy.url, asked, max_tokens=2)
        spent = spent_since(engine, before)
        # The first 40 requests fill the cache and tell the proxy the tokens of the texts.
        if turn >= 40:
            held = records[0]["held_tokens"]
            wrong += abs(held - spent.cached)
            right += max(0, spent.cached + spent.computed - abs(held - spent.cached))
            cached += spent.cached
            evicted += spent.cached < 128
    shown = proxy.instances()[0]["kv_events"]
    share = right / (right + wrong)
    logging.info(
        "%d of %d prompt tokens predicted, %d tokens from the cache, %d requests after evictions",
        right,
        right + wrong,
        cached,
        evicted,
    )
    assert shown["is_complete"]
    assert shown["blocks"] <= BLOCKS
    assert cached > 5_000, "the cache is used"
    assert evicted > 10, "blocks are evicted"
    assert share >= LEAST, f"predicted {share:.1%} of {right + wrong} tokens, {cached} cached"
    # The same without the tokens that nobody expects in the cache.
    assert wrong <= (1 - LEAST) * cached, (wrong, cached)
    assert proxy.metrics().sum("pd_proxy_kv_events_total", result="lost") == 0
    assert get_json(f"{proxy.url}/instances")[0]["models"] == ["m"]
