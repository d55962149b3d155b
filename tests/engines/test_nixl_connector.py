"""Tests vLLM's own NixlConnector behind the proxy, without any sidecar.

The tests run only on demand, because they start two more engines, which takes a minute and a half.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.engines import NixlPair
from harness.client import complete, post_json
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
