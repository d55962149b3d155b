"""Tests that every endpoint answers through the proxy as a plain engine answers, except for ids and times.

Endpoints that generate text from a prompt are split over the pair, so these tests also assert that KV was moved.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness.client import Reply, ask
from harness.model import KV_BYTES_PER_TOKEN
from harness.pair import Pair, check_tokens
from harness.reference import Reference

# Fields whose values are new in each answer, name the engine's configuration, or count the events of a stream: an
# engine puts several tokens into one event if they come at the same time.
NEW = {"id", "item_id", "created", "created_at", "response_id", "request_id", "system_fingerprint", "sequence_number"}

# The plain engine has no prefix cache, so it puts no tokens into a cache.
CACHE = {"cache_write_tokens"}

TEXT = "Say something about prefill and decode. "
CHAT = [{"role": "user", "content": TEXT * 20}]
GREEDY: dict[str, Any] = {"model": "m", "temperature": 0}

# Bodies of the endpoints that are split.
SPLIT: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": (
        "/v1/messages",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": TEXT * 20}]}],
            "system": "Be brief.",
            "max_tokens": 16,
        },
    ),
    "responses": ("/v1/responses", {"input": TEXT * 21, "instructions": "Be brief.", "max_output_tokens": 16}),
    "responses to messages": ("/v1/responses", {"input": CHAT, "max_output_tokens": 16, "store": False}),
    "invocations": ("/invocations", {"messages": CHAT, "max_tokens": 16}),
}

CONVERSATIONS = [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]

# Requests that the proxy passes on, or that it refuses as the engine would.
PASSED: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/version", None),
    ("GET", "/ping", None),
    ("POST", "/ping", None),
    ("GET", "/load", None),
    ("GET", "/tokenizer_info", None),
    ("POST", "/tokenize", {"model": "m", "prompt": "hello world"}),
    ("POST", "/tokenize", {"model": "m", "messages": CHAT, "add_generation_prompt": False}),
    ("POST", "/tokenize", {"model": "m"}),
    ("POST", "/detokenize", {"model": "m", "tokens": [5, 6, 7, 8]}),
    ("POST", "/v1/messages/count_tokens", {"model": "m", "messages": CHAT}),
    ("POST", "/v1/embeddings", {"model": "m", "input": "hello"}),
    ("POST", "/v2/embed", {"model": "m", "texts": ["hello"]}),
    ("POST", "/pooling", {"model": "m", "input": "hello"}),
    ("POST", "/classify", {"model": "m", "input": "hello"}),
    ("POST", "/score", {"model": "m", "text_1": "a", "text_2": "b"}),
    ("POST", "/v1/score", {"model": "m", "text_1": "a", "text_2": "b"}),
    ("POST", "/rerank", {"model": "m", "query": "a", "documents": ["b"]}),
    ("POST", "/v1/rerank", {"model": "m", "query": "a", "documents": ["b"]}),
    ("POST", "/v2/rerank", {"model": "m", "query": "a", "documents": ["b"]}),
    ("POST", "/v1/audio/transcriptions", {"model": "m"}),
    ("POST", "/v1/audio/translations", {"model": "m"}),
    ("POST", "/v1/chat/completions/batch", {**GREEDY, "messages": CONVERSATIONS, "max_tokens": 4}),
    ("POST", "/v1/chat/completions/batch", {**GREEDY, "messages": CHAT, "max_tokens": 4}),
    ("POST", "/invocations", {"model": "m", "input": "hello"}),
    ("GET", "/v1/responses/resp_unknown", None),
    ("DELETE", "/v1/responses/resp_unknown", None),
    ("POST", "/v1/responses/resp_unknown/cancel", None),
    ("POST", "/v1/responses", {"model": "m", "input": "a", "previous_response_id": "resp_unknown"}),
    ("POST", "/v1/responses", {"model": "nobody", "input": "a"}),
    ("POST", "/v1/messages", {"model": "nobody", "messages": CHAT, "max_tokens": 4}),
    ("POST", "/v1/messages", {"model": "m", "messages": CHAT, "max_tokens": 0}),
]


def same(value: Any) -> Any:
    """Returns an answer without ids and times."""
    if isinstance(value, dict):
        return {key: same(inner) for key, inner in value.items() if key not in NEW | CACHE}
    return [same(inner) for inner in value] if isinstance(value, list) else value


def content(reply: Reply) -> Any:
    """Returns a body as JSON, the events of a stream as a list, or any other body as text."""
    if reply.kind.startswith("text/event-stream"):
        data = [line[5:].strip() for line in reply.text.splitlines() if line.startswith("data:")]
        return [same(json.loads(one)) if one.startswith("{") else one for one in data]
    return same(json.loads(reply.text)) if reply.text.startswith(("{", "[")) else reply.text


def words(events: Any) -> str:
    """Returns the text of a stream of messages or of a response."""
    deltas = [event["delta"] for event in events if isinstance(event, dict) and "delta" in event]
    return "".join(delta.get("text", "") if isinstance(delta, dict) else delta for delta in deltas)


@pytest.mark.parametrize(
    ("name", "stream"), [*((name, False) for name in SPLIT), ("messages", True), ("responses", True)]
)
def test_split(pair: Pair, reference: Reference, name: str, stream: bool) -> None:
    path, more = SPLIT[name]
    body = {**GREEDY, **more, "stream": stream}
    plain = ask(f"{reference.engine.url}{path}", body)
    before = pair.decode.prompt_tokens()
    ours = ask(f"{pair.proxy.url}{path}", body)
    assert (ours.status, ours.kind) == (plain.status, plain.kind) == (200, plain.kind), ours.text
    mine, theirs = content(ours), content(plain)
    if stream:
        assert words(mine)
        assert words(mine) == words(theirs)
        assert mine[0] == theirs[0]
        assert mine[-1] == theirs[-1]
    else:
        assert mine == theirs
    record = pair.proxy.record(ours.headers["x-request-id"])
    assert record["alone"] is None, record
    tokens = record["prompt_tokens"]
    assert tokens > 100
    check_tokens(pair.prompt_tokens_since(before, tokens), tokens)
    for sidecar in (pair.sender, pair.receiver):
        moved = sidecar.record(ours.headers["x-request-id"])
        assert (moved["reason"], moved["bytes"]) == (None, tokens * KV_BYTES_PER_TOKEN), moved


def test_passed_on(pair: Pair, reference: Reference) -> None:
    different = []
    for method, path, body in PASSED:
        plain = ask(f"{reference.engine.url}{path}", body, method=method)
        ours = ask(f"{pair.proxy.url}{path}", body, method=method)
        mine, theirs = ((reply.status, reply.kind, content(reply)) for reply in (ours, plain))
        if mine != theirs:
            different.append(f"{method} {path} {body}: {mine} instead of {theirs}")
    assert not different, "\n".join(different)


def test_stored_responses(pair: Pair, reference: Reference) -> None:
    """A stored response is continued, shown and cancelled by the engine that holds it."""

    def talk(url: str) -> list[tuple[int, Any]]:
        first = ask(f"{url}/v1/responses", {**GREEDY, "input": TEXT * 20, "max_output_tokens": 8})
        told = json.loads(first.text)["id"]
        more = {"input": "And more.", "previous_response_id": told, "max_output_tokens": 8}
        second = ask(f"{url}/v1/responses", {**GREEDY, **more})
        shown = ask(f"{url}/v1/responses/{told}")
        assert json.loads(shown.text)["id"] == told
        assert json.loads(second.text)["previous_response_id"] == told
        cancelled = ask(f"{url}/v1/responses/{told}/cancel", method="POST")
        answers = []
        for reply in (first, second, shown, cancelled):
            body = content(reply)
            body.pop("previous_response_id", None)
            # The decode engine's prefix cache holds the first turn; the plain engine has no cache.
            body.pop("usage", None)
            answers.append((reply.status, body))
        return answers

    before = pair.proxy.metrics().by("pd_proxy_alone", "reason").get("stored_response", 0)
    assert talk(pair.proxy.url) == talk(reference.engine.url)
    assert pair.proxy.metrics().by("pd_proxy_alone", "reason")["stored_response"] == before + 1
