"""A scripted engine that moves real KV: an OpenAI server whose legs use a sidecar as the connector of vLLM does.

It computes nothing. A prompt is a list of token ids. Each byte of its KV, and the text of its answer, follow from the
tokens, so a decode leg checks all KV that arrives. If no KV arrives, the decode leg gives the same answer, as an engine
that computes the prompt itself.
"""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness.scripted import JsonHandler, serving
from harness.sidecar import CHUNK_TOKENS
from pd_sidecar.client import Client, Lost, NotConnectedError
from pd_sidecar.sidecar.wire import Ended, Granted, Hello, Layout, Ready, Target

LAYOUT = Layout("tiny", "bfloat16", 2, 2, 16, False, CHUNK_TOKENS)
TOKEN_BYTES = LAYOUT.chunk_bytes // CHUNK_TOKENS
PARK_MS = 10_000
LEG_BOUND_S = 60.0


def text_of(prompt: list[int]) -> str:
    """Returns the answer to a prompt."""
    return f"sum {sum(prompt)} of {len(prompt)}"


def prompt_of(body: dict[str, Any]) -> list[int]:
    """Returns the token ids of a request. Each byte of a text is a token."""
    if "messages" in body:
        return list("\n".join(message["content"] for message in body["messages"]).encode())
    prompt = body["prompt"]
    return list(prompt.encode()) if isinstance(prompt, str) else list(prompt)


def kv_of(prompt: list[int], chunk: int) -> bytes:
    """Returns the KV of one chunk of a prompt. It depends on all tokens up to the end of the chunk."""
    end = min(len(prompt), (chunk + 1) * CHUNK_TOKENS)
    word = zlib.crc32(repr(prompt[:end]).encode()).to_bytes(4, "little")
    return word * ((end - chunk * CHUNK_TOKENS) * TOKEN_BYTES // 4)


def keys_of(prompt: list[int]) -> list[str]:
    chunks = -(-len(prompt) // CHUNK_TOKENS)
    hashes = (zlib.crc32(repr(prompt[: (chunk + 1) * CHUNK_TOKENS]).encode()) for chunk in range(chunks))
    return [f"tiny@1@0@{value:x}@bfloat16" for value in hashes]


class Transfer:
    """One leg that moves KV."""

    def __init__(self, req: str, prompt: list[int], target: Target | None) -> None:
        self.req, self.prompt, self.target = req, prompt, target
        # The reason of the end, and the number of bytes.
        self.done: Future[tuple[str | None, int]] = Future()


class KvEngine:
    """An engine in one role, `prefill` or `decode`, with its sidecar's socket."""

    def __init__(self, role: str, socket: Path) -> None:
        self.role = role
        # Bytes of KV that the decode legs have compared, and the legs that got no KV, with the reasons.
        self.bytes_checked = 0
        self.alone: list[str] = []
        self.wrong: list[str] = []
        # Pause before each further token of a stream.
        self.token_s = 0.0
        self._socket = socket
        self._waiting: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        self._running: dict[str, Transfer] = {}
        self._stop = threading.Event()
        self._stack = ExitStack()
        engine = self

        class Handler(JsonHandler):
            def do_GET(self) -> None:
                self.answer({"data": [{"id": "m", "object": "model"}]})

            def do_POST(self) -> None:
                body = self.body()
                answer = engine.serve(body)
                if body.get("stream"):
                    self.stream(engine.events(body, answer))
                else:
                    self.answer(answer)

        self.url = "http://" + self._stack.enter_context(serving(Handler))

    def start(self) -> None:
        """Starts the thread that speaks with the sidecar. It connects again whenever the sidecar restarts."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._stack.close()

    def serve(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = prompt_of(body)
        params = body.get("kv_transfer_params") or {}
        answer: dict[str, Any] = {
            "id": "a", "object": "text_completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "text": text_of(prompt), "finish_reason": "stop", "logprobs": None}],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": 1, "total_tokens": len(prompt) + 1},
        }  # fmt: skip
        spec = params.get("disagg_spec") or {}
        if params.get("do_remote_decode") and spec.get("receiver_host"):
            target = Target(spec["receiver_host"], spec["receiver_init_port"][0], spec["receiver_alloc_port"][0])
            self._move(Transfer(spec["req_id"], prompt, target))
            answer["kv_transfer_params"] = {"pushed": True, "req_id": spec["req_id"]}
        elif params.get("do_remote_prefill"):
            reason, size = self._move(Transfer(spec["req_id"], prompt, None))
            if reason is None and size:
                self.bytes_checked += size
            else:
                self.alone.append(reason or "no bytes")
        return answer

    def events(self, body: dict[str, Any], answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the events of a streamed answer with `max_tokens` tokens, the last of which has the usage."""
        tokens = body["max_tokens"]
        for token in range(tokens):
            if token:
                time.sleep(self.token_s)
            text = answer["choices"][0]["text"] if token == 0 else " more"
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if token + 1 == tokens else None}
            choice |= {"delta": {"content": text}} if "messages" in body else {"text": text}
            if body.get("return_token_ids"):
                choice["token_ids"] = [7]
            yield {**answer, "choices": [choice], "usage": None}
        prompt = answer["usage"]["prompt_tokens"]
        usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
        yield {**answer, "choices": [], "usage": usage}

    def _move(self, transfer: Transfer) -> tuple[str | None, int]:
        self._waiting.put(transfer)
        return transfer.done.result(LEG_BOUND_S)

    def _run(self) -> None:
        hello = Hello(v=1, engine=self.role, role=self.role, rank=0, world_size=1, layout=LAYOUT)
        client = Client(str(self._socket), hello)
        try:
            while not self._stop.is_set():
                while not self._waiting.empty():
                    self._begin(client, self._waiting.get())
                for message in client.wait(0.005):
                    self._take(client, message)
        finally:
            client.close()

    def _begin(self, client: Client, transfer: Transfer) -> None:
        keys, tokens = keys_of(transfer.prompt), len(transfer.prompt)
        try:
            if transfer.target is None:
                client.await_(transfer.req, keys, tokens=tokens, have_tokens=0, deadline_ms=PARK_MS)
            else:
                client.reserve(transfer.req, transfer.target, keys, tokens=tokens, upto=tokens, overlap=True)
            self._running[transfer.req] = transfer
        except NotConnectedError:
            transfer.done.set_result(("not connected", 0))

    def _take(self, client: Client, message: object) -> None:
        if isinstance(message, Lost):
            for lost in self._running.values():
                lost.done.set_result(("connection lost", 0))
            self._running.clear()
            return
        known = self._running.get(getattr(message, "req", ""))
        if known is None:
            return
        transfer = known
        try:
            if isinstance(message, Granted):
                for chunk, slot in zip(message.chunks, message.slots, strict=True):
                    kv = kv_of(transfer.prompt, chunk)
                    client.slot(slot)[: len(kv)] = kv
                if message.chunks:
                    client.staged(transfer.req, message.chunks)
            elif isinstance(message, Ready):
                for chunk, slot in zip(message.chunks, message.slots, strict=True):
                    kv = kv_of(transfer.prompt, chunk)
                    if bytes(client.slot(slot)[: len(kv)]) != kv:
                        self.wrong.append(f"{transfer.req}, chunk {chunk}")
                client.release(transfer.req, message.chunks)
            elif isinstance(message, Ended):
                del self._running[transfer.req]
                transfer.done.set_result((message.reason, message.bytes))
        except NotConnectedError:
            # `Lost` follows, and ends the transfer.
            pass
