"""Tests the proxy's other hand-over modes: decode legs at other times, and first tokens from the prefill engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from harness.client import Stream
from harness.pair import Pair, check_tokens
from harness.prompts import prompt
from harness.reference import Reference

ANSWER = 24
MESSAGES = [{"role": "user", "content": "import os and list a directory, " * 20}]


@contextlib.contextmanager
def flags(pair: Pair, *words: str) -> Iterator[None]:
    """Runs the proxy with these flags inside the block."""
    with pair.proxy.flags(*words):
        pair.wait_sidecars()
        yield
    pair.wait_sidecars()


def streamed(url: str, path: str, **ask: Any) -> tuple[str, dict[str, int], list[str | None]]:
    """Returns text, usage and finish reasons of a stream."""
    body = {"model": "m", "temperature": 0, "ignore_eos": True, "stream": True, **ask}
    text = ""
    usage: dict[str, int] = {}
    reasons: list[str | None] = []
    with Stream(url + path, {**body, "stream_options": {"include_usage": True}}) as stream:
        for event in stream:
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                text += (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    return text, usage, reasons


@pytest.mark.parametrize("at", ["arrival", "answer"])
def test_the_decode_leg_at_other_times(pair: Pair, reference: Reference, at: str) -> None:
    with flags(pair, "--decode-leg", at):
        for tokens in (1, 300, 1500):
            ids = prompt(tokens, seed=310 + tokens)
            pair.move(ids).check(reference.token_ids(ids), tokens)


def test_the_first_token_from_the_prefill_engine(pair: Pair, reference: Reference) -> None:
    """The text does not depend on the side that gives the first token. If the first token is half a character, the
    decode engine gives it.
    """
    gave: list[int] = []
    with flags(pair, "--first-token", "prefill"):
        for tokens in (2, 64, 255, 256, 257, 300, 513, 600, 1100, 1500):
            ids = prompt(tokens, seed=330 + tokens)
            ask = {"prompt": ids, "max_tokens": ANSWER}
            expect = streamed(reference.engine.url, "/v1/completions", **ask)
            before = pair.decode.prompt_tokens()
            with pair.proxy.recorded() as records:
                assert streamed(pair.proxy.url, "/v1/completions", **ask) == expect, tokens
            spent = pair.prompt_tokens_since(before, tokens)
            given = spent.external + spent.cached + spent.computed - tokens
            assert given in (0, 1), spent
            if given:
                assert (spent.external, spent.computed) == (tokens, 1), spent
                gave.append(tokens)
            else:
                check_tokens(spent, tokens)
            (record,) = records
            assert (record["alone"], record["outcome"]) == (None, "done"), record
    assert gave, "no first token could be shown by itself"


def test_a_chat_with_its_first_token_from_the_prefill_engine(pair: Pair, reference: Reference) -> None:
    ask = {"messages": MESSAGES, "max_tokens": ANSWER}
    path = "/v1/chat/completions"
    with flags(pair, "--first-token", "prefill"):
        expect = streamed(reference.engine.url, path, **ask)
        with pair.proxy.recorded(moved=True) as records:
            assert streamed(pair.proxy.url, path, **ask) == expect
        assert records[0]["moved"]["bytes"] > 0, records
        # A request for one token is handed over in the usual way.
        short = {**ask, "max_tokens": 1}
        assert streamed(pair.proxy.url, path, **short) == streamed(reference.engine.url, path, **short)
