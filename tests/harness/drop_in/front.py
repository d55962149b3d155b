"""Serves an engine's HTTP interface in front of a PD backend.

Prompts are token ids. The KV of a prompt comes from `chunks`; it is not computed.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from harness.drop_in.chunks import Prompt
from harness.drop_in.nodes import OurReceiver, OurSender, Receiver, Sender
from harness.ports import free_port
from pd_sidecar.sidecar.wire import Target

FIRST = 777
"""The first token of every answer of a prefill leg."""

Serve = Callable[[list[int], dict[str, Any]], dict[str, Any]]


class Front:
    """An HTTP server. `backend` may be set later, because an engine listens before it can serve."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.backend: Any = None
        self.asked: list[dict[str, Any]] = []
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(200 if front.backend is not None else 503, {"object": "list", "data": [{"id": "m"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                front.asked.append({"path": self.path, **body})
                try:
                    status, answer = 200, front.serve(self.path, body)
                except Exception as error:  # noqa: BLE001 - the client gets the error
                    status, answer = 500, {"error": {"message": repr(error)}}
                # The proxy closes the connection of a prefill leg if the client already has its answer.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self._answer(status, answer)

            def _answer(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def serve(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/tokenize":
            return {"tokens": ids_of(body), "count": len(ids_of(body))}
        ids, spec = ids_of(body), (body.get("kv_transfer_params") or {}).get("disagg_spec") or {}
        if "receiver_host" in spec:
            text, more = self._prefill(self.backend, ids, spec)
        else:
            text, more = self._decode(self.backend, ids, spec), {}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
        choice |= {"message": {"role": "assistant", "content": text}} if "chat" in path else {"text": text}
        return {"id": "a", "object": "o", "model": "m", "choices": [choice], "usage": usage, **more}

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @staticmethod
    def _prefill(backend: Sender, ids: list[int], spec: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        to = Target(spec["receiver_host"], spec["receiver_init_port"][0], spec["receiver_alloc_port"][0])
        put = backend.put(spec["req_id"], to, kv_of(ids))
        assert put.error is None, put
        params = {"first_tok": FIRST, **({"pushed": True} if isinstance(backend, OurSender) else {})}
        return "first,", {"kv_transfer_params": params}

    @staticmethod
    def _decode(backend: Receiver, ids: list[int], spec: dict[str, Any]) -> str:
        """Returns `equal`, or the number of chunks that differ from the sent chunks."""
        if isinstance(backend, OurReceiver):
            kv = kv_of(ids)
            sums = backend.get(spec["req_id"], kv, written=bool(spec.get("written"))) if spec else [None] * kv.chunks
        else:
            # LMCache looks up all tokens except the last one.
            kv = kv_of(ids[:-1])
            sums = backend.get("", kv)
        wrong = sum(found != sent for found, sent in zip(sums, kv.sums, strict=True))
        return f"{wrong} of {kv.chunks} wrong" if wrong else "equal"


def ids_of(body: dict[str, Any]) -> list[int]:
    """Returns the token ids of a request. The text `COUNT NUMBER` of a chat stands for COUNT times the token NUMBER."""
    if "messages" not in body:
        ids: list[int] = body["prompt"]
        return ids
    count, first = map(int, body["messages"][-1]["content"].split())
    return [first] * count


def kv_of(ids: list[int]) -> Prompt:
    return Prompt(ids[0], len(ids), ids[0])
