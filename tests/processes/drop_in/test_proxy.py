"""Tests pd-proxy between real backends: LMCache on both sides, this project on both sides, and each of them on only one
side.

The engines' HTTP servers are scripted. The KV, the messages to the proxy and all messages between the two sides are
real.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.client import post_json
from harness.drop_in.front import FIRST, Front
from harness.drop_in.nodes import LmcacheReceiver, LmcacheSender, OurReceiver, OurSender
from harness.logs import LOGS
from harness.proxy import Proxy

KINDS = ("ours", "sync", "async")
_numbers = itertools.count(40_000)


@dataclass
class Both:
    """A pair behind the proxy."""

    proxy: Proxy
    prefill: Front
    decode: Front
    kinds: tuple[str, str]


@pytest.fixture(scope="module", params=itertools.product(KINDS, KINDS), ids="-".join)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder: Path = tmp_path_factory.mktemp("proxy")
    prefill, decode = Front(), Front()
    kinds: tuple[str, str] = request.param
    proxy = Proxy(LOGS)
    words: list[str] = []
    registration = int(proxy.registration.rsplit(":", 1)[1])
    stops: list[Any] = [prefill, decode, proxy]
    try:
        if kinds[1] != "ours":
            decode.backend = LmcacheReceiver(kinds[1])
            to = decode.backend.target
            words += ["--decoder-host", "127.0.0.1", "--decoder-port", str(decode.port)]
            words += ["--decoder-init-port", str(to.init_port), "--decoder-alloc-port", str(to.alloc_port)]
        if kinds[0] != "ours":
            words += ["--prefiller-host", "127.0.0.1", "--prefiller-port", str(prefill.port)]
        proxy.add_flags(*words)
        proxy.start()
        if kinds[1] == "ours":
            decode.backend = OurReceiver(folder, proxy=proxy.registration, engine_url=decode.url)
        if kinds[0] == "ours":
            prefill.backend = OurSender(folder, proxy=proxy.registration, engine_url=prefill.url)
        else:
            prefill.backend = LmcacheSender(kinds[0], proxy_port=registration)
        stops += [prefill.backend, decode.backend]
        proxy.wait_ready()
        yield Both(proxy, prefill, decode, kinds)
    finally:
        for part in reversed(stops):
            part.stop()


@pytest.mark.parametrize("tokens", [300, 17 * 256])
def test_a_completion(both: Both, tokens: int) -> None:
    number = next(_numbers)
    body = {"model": "m", "prompt": [number] * tokens, "max_tokens": 8}
    with both.proxy.recorded(moved=True) as records:
        answer = post_json(f"{both.proxy.url}/v1/completions", body, timeout_s=60.0)
    check(both, records[0], answer, answer["choices"][0]["text"])


def test_a_chat(both: Both) -> None:
    content = f"700 {next(_numbers)}"
    body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    with both.proxy.recorded(moved=True) as records:
        answer = post_json(f"{both.proxy.url}/v1/chat/completions", body, timeout_s=60.0)
    check(both, records[0], answer, answer["choices"][0]["message"]["content"])


def check(both: Both, record: dict[str, Any], answer: dict[str, Any], text: str) -> None:
    assert record["moved"], record
    assert (record["alone"], record["outcome"]) == (None, "done"), record
    asked = both.decode.asked[-1]
    if both.kinds[1] == "ours":
        assert text == "equal", answer
        written = asked["kv_transfer_params"]["disagg_spec"].get("written", False)
        assert written == (both.kinds[0] != "ours")
    else:
        # The first token comes from the prefill side; the decode side continues after it.
        assert text == "first,equal", answer
        assert asked["prompt"][-1] == FIRST
