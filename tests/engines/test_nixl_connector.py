"""Tests vLLM's own NixlConnector behind the proxy, without any sidecar.

The tests run only on demand, because they start two more engines, which takes a minute and a half.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench.engines import NixlPair
from harness.client import ask, complete, post_json
from harness.engine import wait_for
from harness.model import write_model
from harness.process import ended_by_signals
from harness.progress import Progress
from harness.prompts import prompt
from harness.proxy import Proxy
from harness.sidecar import ROOT

pytestmark = [
    pytest.mark.own_engines,
    pytest.mark.skipif(os.environ.get("PD_TEST_NIXL_CONNECTOR") != "1", reason="on demand: PD_TEST_NIXL_CONNECTOR=1"),
]


@pytest.fixture(scope="module")
def behind_proxy(logs: Path) -> Iterator[tuple[NixlPair, Proxy]]:
    pair = NixlPair(write_model(ROOT / "target" / "model"), logs)
    proxy = Proxy(logs, ["--prefill", pair.prefill.url, "--decode", pair.decode.url])
    parts = (pair.prefill, pair.decode, proxy)
    with ended_by_signals():
        try:
            for part in parts:
                part.start()
            wait_for((pair.prefill, pair.decode), Progress())
            proxy.wait_ready()
            yield pair, proxy
        finally:
            for part in parts:
                part.stop()


@pytest.mark.parametrize("tokens", [50, 300, 1500])
def test_texts_are_equal(behind_proxy: tuple[NixlPair, Proxy], tokens: int) -> None:
    pair, proxy = behind_proxy
    ids = prompt(tokens, seed=91)
    before = pair.decode.prompt_tokens()
    answer = complete(proxy.url, ids, max_tokens=24)
    spent = pair.decode.prompt_tokens() - before
    assert spent.external >= tokens - 1, spent
    record = proxy.record(answer.headers["x-request-id"])
    assert (record["alone"], record["outcome"]) == (None, "done"), record
    # Without its prefix cache, the decode engine computes the whole prompt itself.
    pair.decode.reset_prefix_cache()
    assert answer.token_ids == complete(pair.decode.url, ids, max_tokens=24).token_ids


def test_chat_that_is_not_streamed(behind_proxy: tuple[NixlPair, Proxy]) -> None:
    pair, proxy = behind_proxy
    messages = [{"role": "user", "content": "list the files of a folder " * 20}]
    body = {"model": "m", "messages": messages, "max_completion_tokens": 16, "temperature": 0, "ignore_eos": True}
    with proxy.recorded() as records:
        through = post_json(f"{proxy.url}/v1/chat/completions", body)
    pair.decode.reset_prefix_cache()
    alone = post_json(f"{pair.decode.url}/v1/chat/completions", body)
    assert through["choices"][0]["message"] == alone["choices"][0]["message"]
    assert through["usage"]["completion_tokens"] == 16
    assert records[0]["alone"] is None


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/messages", {"messages": [{"role": "user", "content": "who wrote this file? " * 20}], "max_tokens": 16}),
        ("/v1/responses", {"input": "who reads this file? " * 20, "max_output_tokens": 16}),
    ],
)
def test_newer_endpoints(behind_proxy: tuple[NixlPair, Proxy], path: str, more: dict[str, Any]) -> None:
    pair, proxy = behind_proxy
    body = {"model": "m", "temperature": 0, **more}
    before = pair.decode.prompt_tokens()
    through = ask(f"{proxy.url}{path}", body)
    spent = pair.decode.prompt_tokens() - before
    record = proxy.record(through.headers["x-request-id"])
    assert (record["alone"], record["outcome"]) == (None, "done"), record
    assert spent.external >= record["prompt_tokens"] - 1 > 50, spent
    pair.decode.reset_prefix_cache()
    alone = json.loads(ask(f"{pair.decode.url}{path}", body).text)
    told = json.loads(through.text)
    output = "content" if path == "/v1/messages" else "output"
    texts = [[part.get("text") or part["content"][0]["text"] for part in answer[output]] for answer in (told, alone)]
    assert texts[0] == texts[1]
    assert told["usage"] == alone["usage"]
    assert told.get("kv_transfer_params") is None
