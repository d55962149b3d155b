"""A small HTTP client: JSON calls, and streamed completions that a test can abort at any point."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

# The time limit of a call. No request of the tests takes longer; a test may set a shorter limit.
TIMEOUT_S = 120.0


class HttpError(Exception):
    """Reports an answer with a status other than 2xx."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body[:500]}")
        self.status = status
        self.body = body


@dataclass
class Answer:
    """One completion as the client received it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    # For each token, the most probable tokens with their log-probabilities; empty unless the request asks for them.
    top: list[dict[str, float]] = field(default_factory=list)
    # Seconds from sending the request to the first token, and to the end of the answer.
    first_s: float = 0.0
    total_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


def call(url: str, body: object = None, *, method: str | None = None, timeout_s: float = TIMEOUT_S) -> tuple[int, str]:
    """Sends one request with `body` as JSON. Returns status and text, whatever the status is."""
    with _Exchange(url, body, method=method, timeout_s=timeout_s) as exchange:
        return exchange.response.status, exchange.response.read().decode(errors="replace")


@dataclass(frozen=True)
class Reply:
    """A whole answer of any form."""

    status: int
    # The names of the headers are in lower case.
    headers: dict[str, str]
    text: str

    @property
    def kind(self) -> str:
        """The content type; empty if there is none."""
        return self.headers.get("content-type", "")


def ask(url: str, body: object = None, *, method: str | None = None, timeout_s: float = TIMEOUT_S) -> Reply:
    """Sends one request with `body` as JSON. Returns the whole answer, whatever its status is."""
    with _Exchange(url, body, method=method, timeout_s=timeout_s) as exchange:
        headers = {name.lower(): value for name, value in exchange.response.getheaders()}
        return Reply(exchange.response.status, headers, exchange.response.read().decode(errors="replace"))


def get_json(url: str, *, timeout_s: float = 30.0) -> Any:
    status, text = call(url, timeout_s=timeout_s)
    if status // 100 != 2:
        raise HttpError(status, text)
    return json.loads(text)


def post_json(url: str, body: object, *, timeout_s: float = TIMEOUT_S) -> Any:
    status, text = call(url, body, timeout_s=timeout_s)
    if status // 100 != 2:
        raise HttpError(status, text)
    return json.loads(text)


def post(url: str, body: object, headers: dict[str, str], *, timeout_s: float = TIMEOUT_S) -> str:
    """Sends one request with `body` as JSON and these headers. Returns the text of an answer with status 2xx."""
    with _Exchange(url, body, headers=headers, timeout_s=timeout_s) as exchange:
        text = exchange.response.read().decode(errors="replace")
        if exchange.response.status // 100 != 2:
            raise HttpError(exchange.response.status, text)
        return text


def complete(
    base: str,
    prompt: str | list[int],
    *,
    max_tokens: int,
    request_id: str | None = None,
    on_text: Callable[[str], None] | None = None,
    timeout_s: float = TIMEOUT_S,
    **more: object,
) -> Answer:
    """Returns a greedy, streamed completion with its token ids. `more` holds further fields of the request body."""
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        **more,
    }
    headers = {"x-request-id": request_id} if request_id else {}
    start = time.perf_counter()
    answer = Answer()
    with Stream(f"{base}/v1/completions", body, headers=headers, timeout_s=timeout_s) as stream:
        answer.headers = stream.headers
        for event in stream:
            for choice in event["choices"]:
                answer.first_s = answer.first_s or time.perf_counter() - start
                answer.text += choice["text"]
                answer.token_ids += choice.get("token_ids") or []
                answer.top += (choice.get("logprobs") or {}).get("top_logprobs") or []
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
                if on_text is not None:
                    on_text(choice["text"])
    answer.total_s = time.perf_counter() - start
    return answer


class Stream:
    """The server-sent events of one request.

    Leaving the `with` block closes the connection, even in the middle of the stream.
    """

    def __init__(
        self, url: str, body: object, *, headers: dict[str, str] | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._exchange = _Exchange(url, body, headers=headers, timeout_s=timeout_s)
        if self._exchange.response.status // 100 != 2:
            with self._exchange as exchange:
                raise HttpError(exchange.response.status, exchange.response.read().decode(errors="replace"))
        self.headers = {name.lower(): value for name, value in self._exchange.response.getheaders()}

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._exchange.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the events up to `[DONE]`.

        Raises `HttpError` for an error event, or if the stream ends without `[DONE]`.
        """
        for line in self._exchange.response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                code = event["error"].get("code")
                # The code of an engine's error is an HTTP status; the code of the proxy's error is text.
                raise HttpError(code if isinstance(code, int) else 500, data.decode())
            yield event
        raise HttpError(0, "the stream ended without [DONE]")


class _Exchange:
    """A connection on which one request was sent and the status and headers of the answer were read."""

    def __init__(
        self,
        url: str,
        body: object = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float,
    ) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        data = None if body is None else json.dumps(body).encode()
        all_headers = {**(headers or {}), **({"content-type": "application/json"} if data is not None else {})}
        try:
            self._connection.request(method or ("GET" if data is None else "POST"), path, data, all_headers)
            self.response = self._connection.getresponse()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.response.close()
        self._connection.close()
