"""Tests real engines with this project's sidecars. The peer of each sidecar is real LMCache.

LMCache's own vLLM adapter does not run on the CPU build of vLLM, so the tests use LMCache's PD backend and its token
database. The sidecar of the prefill engine pushes KV to an LMCache receiver. The receiver finds the chunks under the
keys that LMCache computes for the prompt. An LMCache sender then pushes the chunks to the sidecar of the decode engine.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from harness.client import complete, post_json
from harness.drop_in.chunks import CHUNK_TOKENS
from harness.drop_in.nodes import LmcacheReceiver, LmcacheSender, of_targets
from harness.model import HEAD_SIZE, KV_BYTES_PER_TOKEN, KV_HEADS, LAYERS, write_model
from harness.pair import Pair, check_tokens
from harness.ports import free_port
from harness.prompts import chat, image, prompt
from harness.reference import Reference
from harness.routers import running_lmcache_proxy
from harness.sidecar import ROOT

from pd_sidecar.sidecar.wire import Layout, Target

_requests = itertools.count(1)
# Requests that an engine may need until it has the digest of the files of an adapter, on a busy machine.
TRIES = 200


@pytest.mark.parametrize(("length", "mode"), [(300, "sync"), (1100, "async")])
def test_kv_of_an_engine_goes_through_lmcache(
    pair: Pair, reference: Reference, tmp_path: Path, mode: str, length: int
) -> None:
    # LMCache's agents connect over UCX's TCP. A sidecar accepts UCX's TCP only with this option.
    pair.restart_sidecars(keys={**pair.options.sidecar_keys, "nixl_over_tcp": "trusted"})
    layout = Layout(str(pair.options.model), "float", LAYERS, KV_HEADS, HEAD_SIZE, False, CHUNK_TOKENS)
    tokens = prompt(length, seed=length + len(mode))
    size = length * KV_BYTES_PER_TOKEN
    receiver, sender = LmcacheReceiver(mode, slots=16, layout=layout), LmcacheSender(mode, layout=layout)
    try:
        keys = receiver.do("keys", tokens=tokens, algorithm="sha256_cbor")["keys"]
        assert len(keys) == -(-length // CHUNK_TOKENS)

        # The prefill leg has the form that LMCache's proxy sends.
        req = f"mixed-{next(_requests)}"
        to = receiver.target
        spec = {
            "req_id": req, "receiver_host": to.host,
            "receiver_init_port": [to.init_port], "receiver_alloc_port": [to.alloc_port],
        }  # fmt: skip
        expect = reference.token_ids(tokens)
        params = {"ret_first_tok": True, "disagg_spec": spec}
        answer = complete(pair.prefill.url, tokens, max_tokens=1, kv_transfer_params=params)
        assert answer.token_ids == expect[:1]
        pushed = pair.sender.record(req)
        assert (pushed["reason"], pushed["bytes"]) == (None, size), pushed
        sums = receiver.do("get", keys=keys, tokens=length, folder=str(tmp_path))["sums"]
        assert None not in sums
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) == size

        # Push from an LMCache sender to the decode engine.
        req = f"mixed-{next(_requests)}"
        to = Target(pair.receiver.host, pair.receiver.init_port, pair.receiver.alloc_port)
        sent = sender.do("put", req=req, to=of_targets([to]), keys=keys, tokens=length, folder=str(tmp_path))
        assert sent == {"written": len(keys), "errors": []}
        assert sender.notices.wait(req) is not None
        before = pair.decode.prompt_tokens()
        params = {"do_remote_prefill": True, "disagg_spec": {"req_id": req, "written": True}}
        answer = complete(pair.decode.url, tokens, max_tokens=24, kv_transfer_params=params)
        assert answer.token_ids == expect
        check_tokens(pair.prompt_tokens_since(before, 1), length)
        received = pair.receiver.record(req)
        assert (received["reason"], received["bytes"]) == (None, size), received
    finally:
        receiver.stop()
        sender.stop()
        sender.notices.close()


def test_requests_whose_keys_have_tags_are_not_shared_with_lmcache(pair: Pair, reference: Reference) -> None:
    """LMCache's keys contain no salt, adapter or image, so LMCache could give the KV to another request."""
    pair.restart_sidecars(keys={**pair.options.sidecar_keys, "nixl_over_tcp": "trusted"})
    layout = Layout(str(pair.options.model), "float", LAYERS, KV_HEADS, HEAD_SIZE, False, CHUNK_TOKENS)
    completion = {"prompt": prompt(300, seed=78), "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    receiver = LmcacheReceiver("sync", slots=16, layout=layout)
    to = receiver.target
    spec = {
        "receiver_host": to.host, "receiver_init_port": [to.init_port], "receiver_alloc_port": [to.alloc_port],
    }  # fmt: skip
    try:
        for reason, path, request in [
            ("cache_salt", "/v1/completions", {**completion, "cache_salt": "mine"}),
            ("lora", "/v1/completions", {**completion, "model": "lora"}),
            ("multimodal", "/v1/chat/completions", chat(image(78), "What is this?", max_tokens=8)),
        ]:
            expect = reference.post(path, request)["choices"][0]["token_ids"]
            for _ in range(TRIES):
                req = f"mixed-{next(_requests)}"
                params = {"do_remote_decode": True, "disagg_spec": {"req_id": req, **spec}}
                answer = post_json(pair.prefill.url + path, {**request, "max_tokens": 1, "kv_transfer_params": params})
                assert answer["choices"][0]["token_ids"] == expect[:1]
                # The digest of an adapter's files is computed after its first request.
                if answer["kv_transfer_params"].get("reason") != "lora_pending":
                    break
            assert answer["kv_transfer_params"]["pushed"], answer["kv_transfer_params"]
            pushed = pair.sender.record(req)
            assert (pushed["reason"], pushed["bytes"]) == ("key_mismatch", 0), pushed
            assert receiver.held() == 0, "the receiver was asked for slots"

            before = pair.decode.skipped().get(reason, 0)
            params = {"do_remote_prefill": True, "disagg_spec": {"req_id": req, "written": True}}
            # Until the decode engine has the digest of the adapter's files, the reason is `lora_pending`.
            for _ in range(TRIES):
                answer = post_json(pair.decode.url + path, {**request, "kv_transfer_params": params})
                assert answer["choices"][0]["token_ids"] == expect
                if pair.decode.skipped().get(reason, 0) > before:
                    break
            assert pair.decode.skipped().get(reason, 0) > before, pair.decode.skipped()
    finally:
        receiver.stop()


def test_another_prompt_does_not_hit(pair: Pair, reference: Reference) -> None:
    """Checks that the engine computes a prompt for which no sender pushed KV. So the equal texts in the test above come
    from a transfer.
    """
    tokens = prompt(300, seed=77)
    before = pair.decode.prompt_tokens()
    params = {"do_remote_prefill": True, "disagg_spec": {"req_id": "mixed-nobody", "written": True}}
    answer = complete(pair.decode.url, tokens, max_tokens=24, kv_transfer_params=params)
    assert answer.token_ids == reference.token_ids(tokens)
    assert pair.prompt_tokens_since(before, 1).computed == 300


@pytest.mark.parametrize("kind", ["lmcache", "sidecar"])
def test_the_example_proxy_of_lmcache(pair: Pair, reference: Reference, tmp_path: Path, logs: Path, kind: str) -> None:
    """LMCache's proxy waits until our prefill side has pushed the KV. The proxy's decode leg has no parameters, so our
    decode engine computes the prompt; an engine with LMCache would find the KV by its keys.
    """
    question = "write a file, " * (40 if kind == "lmcache" else 60)
    greedy = {"prompt": question, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    (expect,) = reference.post("/v1/completions", {"model": "m", **greedy})["choices"]
    tokens: list[int] = post_json(f"{pair.prefill.url}/tokenize", {"prompt": question})["tokens"]
    size, notices = len(tokens) * KV_BYTES_PER_TOKEN, free_port()
    keys = {**pair.options.sidecar_keys, "nixl_over_tcp": "trusted", "unclaimed_ms": 1000}
    pair.restart_sidecars(keys=keys)
    layout = Layout(str(pair.options.model), "float", LAYERS, KV_HEADS, HEAD_SIZE, False, CHUNK_TOKENS)
    receiver = LmcacheReceiver("async", slots=16, layout=layout) if kind == "lmcache" else None
    ports = (pair.receiver.init_port, pair.receiver.alloc_port)
    if receiver is not None:
        ports = (receiver.target.init_port, receiver.target.alloc_port)
    model = write_model(ROOT / "target" / "model")
    try:
        with running_lmcache_proxy(pair.prefill, pair.decode, model, ports, notices, logs) as url:
            # The prefill side's sidecar sends its notices to LMCache's proxy.
            pair.sender.stop()
            pair.sender.options = replace(pair.sender.options, proxy=f"127.0.0.1:{notices}")
            pair.sender.start()
            pair.sender.wait_ready()
            pair.prefill.warm_up()
            pair.reset_prefix_caches()
            before, prefilled = pair.decode.prompt_tokens(), pair.prefill.prompt_tokens()
            skipped = pair.decode.skipped().get("no_params", 0)
            answer = complete(url, question, max_tokens=24, model="m")
            assert answer.text == expect["text"]
            assert answer.token_ids == expect["token_ids"][1:]
            # Each prompt is computed twice. The decode leg has the first token, too.
            assert (pair.prefill.prompt_tokens() - prefilled).computed == len(tokens)
            spent = pair.prompt_tokens_since(before, len(tokens) + 1)
            assert (spent.computed, spent.external) == (len(tokens) + 1, 0), spent
            assert pair.decode.skipped()["no_params"] == skipped + 1
            # The proxy numbers its requests from 1.
            pushed = pair.sender.record("1")
            assert (pushed["reason"], pushed["bytes"]) == (None, size), pushed
            if receiver is not None:
                found = receiver.do("keys", tokens=tokens, algorithm="sha256_cbor")["keys"]
                assert None not in receiver.do("get", keys=found, tokens=len(tokens), folder=str(tmp_path))["sums"]
                assert sum(file.stat().st_size for file in tmp_path.iterdir()) == size
            else:
                received = pair.receiver.record("1")
                assert (received["reason"], received["bytes"]) == ("unclaimed", size), received
    finally:
        if receiver is not None:
            receiver.stop()
