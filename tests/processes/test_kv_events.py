"""Tests that the proxy learns from vLLM's own publisher of KV events what an engine holds, also after missed events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from harness.client import post_json
from harness.ports import free_port, free_ports
from harness.proxy import Proxy
from harness.scripted import JsonHandler, serving
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)

BLOCK = 16
BOUND_S = 20.0
# Like vLLM's hashes, which are bytes by default.
HASHES = [bytes([number]) * 32 for number in range(64)]


class Engine(JsonHandler):
    """Answers everything, and tokenises a text into one token per 4 bytes."""

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [{"id": "m"}, {"id": "lora", "parent": "m"}]})

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/tokenize":
            self.answer({"tokens": list(range(len(body["prompt"]) // 4))})
        else:
            self.answer({"choices": [{"index": 0, "text": "x"}]})


def stored(first: int, count: int, *, lora: str | None = None, extra: Any = None) -> BlockStored:
    """Returns the event of `count` blocks after the first `first` blocks of the prompt 0, 1, 2, ..."""
    return BlockStored(
        block_hashes=list(HASHES[first : first + count]),
        parent_block_hash=HASHES[first - 1] if first else None,
        token_ids=list(range(first * BLOCK, (first + count) * BLOCK)),
        block_size=BLOCK,
        lora_id=1 if lora else None,
        medium="GPU",
        lora_name=lora,
        extra_keys=[(lora,) if lora else extra] * count if lora or extra else None,
        group_idx=0,
        kv_cache_spec_kind="full_attention",
    )


class World:
    """A proxy, a scripted engine, and the publishers of the engine's ranks."""

    def __init__(self, proxy: Proxy, ports: tuple[int, int | None]) -> None:
        self.proxy = proxy
        self.ports = ports
        self.publishers: list[ZmqEventPublisher] = []

    def publisher(self, rank: int = 0) -> ZmqEventPublisher:
        port, replay = self.ports
        deadline = time.monotonic() + BOUND_S
        while True:
            try:
                publisher = ZmqEventPublisher(
                    rank, f"tcp://*:{port}", f"tcp://*:{replay}" if replay else None, buffer_steps=100, topic="kv"
                )
                break
            except zmq.ZMQError:
                # The socket of an earlier publisher closes in the background.
                assert time.monotonic() < deadline
        self.publishers.append(publisher)
        return publisher

    def until_heard(self) -> None:
        """Returns when the proxy hears every publisher. Without a replay, events before its subscription are lost."""
        deadline = time.monotonic() + BOUND_S
        while self.proxy.instances()[0]["kv_events"] != {"blocks": 0, "is_complete": True}:
            assert time.monotonic() < deadline
            for publisher in self.publishers:
                publish(publisher, AllBlocksCleared())

    def count(self, result: str) -> float:
        return self.proxy.metrics().sum("pd_proxy_kv_events_total", result=result)

    def until(self, what: dict[str, Any]) -> None:
        deadline = time.monotonic() + BOUND_S
        while (shown := self.proxy.instances()[0].get("kv_events")) != what:
            assert time.monotonic() < deadline, shown
            time.sleep(0.02)

    def held(self, prompt: list[int] | str, **more: Any) -> int:
        """Sends a request and returns the number of tokens that the proxy expected the engine to hold."""
        with self.proxy.recorded() as records:
            post_json(f"{self.proxy.url}/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 1, **more})
        held: int = records[0]["held_tokens"]
        return held


@contextlib.contextmanager
def world(logs: Path, *, replay: bool = True, ranks: int = 1) -> Iterator[World]:
    port, again = free_ports(tuple(range(ranks))), free_port() if replay else None
    with serving(Engine) as address:
        place = f"*=127.0.0.1:{port}" + (f"/{again}" if again else "") + f"x{ranks}"
        proxy = Proxy(logs, ["--decode", address, "--decode-policy", "prefix", "--kv-events", place])
        proxy.start()
        there = World(proxy, (port, again))
        try:
            proxy._until("/ready", BOUND_S)
            yield there
        finally:
            for publisher in there.publishers:
                publisher.shutdown()
            proxy.stop()


def publish(publisher: ZmqEventPublisher, *events: Any) -> None:
    publisher.publish(KVEventBatch(ts=time.time(), events=list(events)))


def test_blocks_come_and_go(tmp_path: Path) -> None:
    prompt = list(range(200))
    with world(tmp_path) as there:
        publisher = there.publisher()
        publish(publisher, stored(0, 8))
        there.until({"blocks": 8, "is_complete": True})
        assert there.held(prompt) == 128
        assert there.held(prompt[:64]) == 48, "an engine always computes the last token"
        assert there.held([5, *prompt]) == 0
        assert there.held(prompt, model="lora") == 0
        assert there.held(prompt, cache_salt="s") == 0
        publish(publisher, BlockRemoved(block_hashes=[HASHES[3]], medium="GPU", group_idx=0))
        there.until({"blocks": 7, "is_complete": True})
        assert there.held(prompt) == 48
        publish(publisher, AllBlocksCleared(), stored(0, 2, lora="lora"))
        there.until({"blocks": 2, "is_complete": True})
        assert there.held(prompt) == 0
        assert there.held(prompt, model="lora") == 32
        publish(publisher, AllBlocksCleared(), stored(0, 1, extra=("s",)))
        there.until({"blocks": 1, "is_complete": True})
        assert there.held(prompt, cache_salt="s") == 16
        assert there.held(prompt) == 0


def test_texts_are_tokenised_after_their_first_answer(tmp_path: Path) -> None:
    text = "abcd" * 100
    with world(tmp_path) as there:
        publish(there.publisher(), stored(0, 4))
        there.until({"blocks": 4, "is_complete": True})
        assert there.held(text) == 0, "nothing is known of the text yet, and it was routed nowhere"
        deadline = time.monotonic() + BOUND_S
        # Before the tokens are known, the proxy guesses that the engine holds the whole prompt.
        while (held := there.held(text)) != 64:
            assert time.monotonic() < deadline, held
        assert there.held(text[:384] + "another end") == 64


def test_missed_events_are_asked_for(tmp_path: Path) -> None:
    with world(tmp_path) as there:
        publisher = there.publisher()
        publish(publisher, stored(0, 2))
        there.until({"blocks": 2, "is_complete": True})
        # The next number is skipped on the wire, but the publisher can send it again.
        payload = publisher._pack.encode(KVEventBatch(ts=0.0, events=[stored(2, 2)], data_parallel_rank=0))
        publisher._buffer.append((next(publisher._seq_gen), payload))
        publish(publisher, stored(4, 1))
        there.until({"blocks": 5, "is_complete": True})
        assert there.held(list(range(200))) == 80
        assert there.count("gap") == 1
        assert there.count("lost") == 0


def test_lost_events_make_the_proxy_guess_again(tmp_path: Path) -> None:
    prompt = list(range(200))
    with world(tmp_path, replay=False) as there:
        publisher = there.publisher()
        there.until_heard()
        publish(publisher, stored(0, 2))
        there.until({"blocks": 2, "is_complete": True})
        assert there.held(prompt) == 32
        next(publisher._seq_gen)
        publish(publisher, stored(4, 1))
        there.until({"blocks": 0, "is_complete": False})
        assert there.held(prompt) > 32, "the prompt was routed there, so the proxy expects it there"
        publish(publisher, AllBlocksCleared(), stored(0, 3))
        there.until({"blocks": 3, "is_complete": True})
        assert there.held(prompt) == 48


def test_an_engine_that_was_started_again(tmp_path: Path) -> None:
    with world(tmp_path, replay=False) as there:
        publisher = there.publisher()
        there.until_heard()
        for first in range(5):
            publish(publisher, stored(first, 1))
        there.until({"blocks": 5, "is_complete": True})
        there.publishers.remove(publisher)
        publisher.shutdown()
        other = there.publisher()
        there.until_heard()
        publish(other, stored(0, 2))
        there.until({"blocks": 2, "is_complete": True})
        assert there.held(list(range(200))) == 32


def test_ranks(tmp_path: Path) -> None:
    with world(tmp_path, replay=False, ranks=2) as there:
        one, other = there.publisher(0), there.publisher(1)
        there.until_heard()
        publish(one, stored(0, 2))
        there.until({"blocks": 2, "is_complete": True})
        publish(other, stored(0, 6))
        there.until({"blocks": 8, "is_complete": True})
        assert there.held(list(range(200))) == 96


@pytest.mark.parametrize(
    "frames",
    [
        [b"kv"],
        [b"kv", b"short", b""],
        [b"kv", b"\xff" * 8, b"\x90"],
        [b"kv", b"\xff" * 7 + b"\xfe", b"\x92\x01\x90"],
        [b"kv", bytes(8), b"\xc1 not msgpack"],
        [b"kv", bytes(8), b"\x92\x01\xdd\xff\xff\xff\xff"],
        [b"kv", bytes(8), b"\x91" * 100_000],
        [b"", b"", b"", bytes(8), b"\x92\x01\x91\x81\xa4type\xabBlockStored"],
        [b"kv"] * 200,
    ],
)
def test_hostile_messages_do_no_harm(tmp_path: Path, frames: list[bytes]) -> None:
    with world(tmp_path, replay=False) as there:
        socket = zmq.Context.instance().socket(zmq.XPUB)
        try:
            socket.bind(f"tcp://127.0.0.1:{there.ports[0]}")
            assert socket.poll(BOUND_S * 1000), "the proxy subscribes"
            for _ in range(3):
                socket.send_multipart(frames)
            assert there.held([1, 2, 3]) == 0
            encoder = __import__("msgspec").msgpack.Encoder()
            good = encoder.encode(KVEventBatch(ts=0.0, events=[AllBlocksCleared(), stored(0, 2)]))
            socket.send_multipart([b"kv", (5).to_bytes(8, "big"), good])
            if frames[1:2] != [b"\xff" * 7 + b"\xfe"]:
                there.until({"blocks": 2, "is_complete": True})
            assert there.held(list(range(100))) in (0, 32)
        finally:
            socket.close(linger=0)
