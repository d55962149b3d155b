"""Sends requests to an OpenAI-compatible server and measures the streamed answers."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

from pd_sidecar.bench.samples import Sample
from pd_sidecar.bench.workload import BadInputError, Conversation, Span, Turn, token_ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

MOST_LINE_BYTES = 16 << 20
"""A longer line of a stream ends the request: a server that never ends a line would fill the memory."""

MOST_ERROR_CHARS = 200
PROBE_S = 10.0
# Short words of everyday English. Tokenizers have one token for each of them.
WORDS = (
    "area", "book", "case", "child", "company", "day", "eye", "fact", "family", "friend", "group", "hand", "head",
    "home", "hour", "house", "job", "kind", "life", "man", "money", "month", "night", "part", "people", "place",
    "point", "power", "question", "room", "school", "side", "state", "story", "study", "system", "time", "water",
    "way", "week", "word", "year",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The form of the requests."""

    model: str
    endpoint: str = "completions"
    """`completions` sends token ids, with exact lengths. `chat` sends texts."""

    ids: Span = field(default_factory=lambda: Span(1000, 10000))
    """Token ids of synthetic prompts. All of them must be in the model's vocabulary."""

    ignore_eos: bool = True
    """Asks for answers of the full length, as vLLM can."""

    timeout_s: float = 600.0


class Server:
    """One server of a run."""

    def __init__(self, name: str, url: str, key: str | None) -> None:
        self.name = name
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def session(self) -> aiohttp.ClientSession:
        """Returns a session without a limit of connections: a limit would delay requests of an open loop."""
        return aiohttp.ClientSession(headers=self._headers, connector=aiohttp.TCPConnector(limit=0))

    async def model(self, session: aiohttp.ClientSession) -> str:
        """Returns the first model that the server names. Raises `aiohttp.ClientError`, `OSError` or `BadInputError`."""
        timeout = aiohttp.ClientTimeout(total=PROBE_S)
        async with session.get(f"{self.url}/v1/models", timeout=timeout) as response:
            response.raise_for_status()
            try:
                name: str = (await response.json(content_type=None))["data"][0]["id"]
            except (ValueError, LookupError, TypeError) as error:
                raise BadInputError(f"{self.url}/v1/models names no model; set --model") from error
            return name

    async def metrics(self, session: aiohttp.ClientSession) -> str:
        """Returns the text of `/metrics`; empty if the server has none."""
        try:
            timeout = aiohttp.ClientTimeout(total=PROBE_S)
            async with session.get(f"{self.url}/metrics", timeout=timeout) as response:
                return await response.text() if response.status == 200 else ""
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return ""


class Dialogue:
    """One conversation under way: it adds each turn and its answer to the prompt of the next turn."""

    def __init__(self, conversation: Conversation, settings: Settings, seed: str) -> None:
        self._conversation = conversation
        self._settings = settings
        self._seed = seed
        self._ids: list[int] = []
        # The seed comes first, so that no server finds the same text of another run in its cache.
        system = f"[{seed}] {conversation.system}".rstrip()
        self._text = f"{system}\n"
        self._messages: list[dict[str, str]] = [{"role": "system", "content": system}]

    async def run(
        self,
        session: aiohttp.ClientSession,
        server: Server,
        samples: list[Sample],
        began: float,
        *,
        late_s: float = 0.0,
        think_s: float = 0.0,
    ) -> bool:
        """Sends all turns, and adds a sample for each. An error ends the conversation. Returns false after an error.

        `began` is the run's begin on the clock of `time.perf_counter`, and `late_s` the delay of the first turn.
        """
        for number, turn in enumerate(self._conversation.turns):
            if number and think_s:
                await asyncio.sleep(think_s)
            body = self.body(turn)
            if number + 1 < len(self._conversation.turns) and isinstance(body.get("prompt"), list):
                # The next prompt continues with the server's own tokens, whose KV the server has.
                body["return_token_ids"] = True
            sample = Sample(number, time.perf_counter() - began, 0.0 if number else late_s)
            heard = await send(session, server, body, self._settings, sample)
            samples.append(sample)
            if sample.error:
                return False
            self.heard(heard.text, heard.ids, sample.answer_tokens)
        return True

    def body(self, turn: Turn) -> dict[str, Any]:
        """Returns the body of a turn's request."""
        body: dict[str, Any] = {
            "model": self._settings.model,
            "max_tokens": turn.answer_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._settings.ignore_eos:
            body["ignore_eos"] = True
        if self._settings.endpoint == "chat":
            text = turn.text or " ".join(WORDS[i % len(WORDS)] for i in self._new_ids(turn))
            self._messages.append({"role": "user", "content": text})
            body["messages"] = list(self._messages)
        elif turn.text:
            self._text += f"{turn.text}\n"
            body["prompt"] = self._text
        else:
            self._ids += self._new_ids(turn)
            body["prompt"] = list(self._ids)
        return body

    def heard(self, text: str, ids: Sequence[int], tokens: int) -> None:
        """Adds an answer. If the server named no token ids, others of equal number take their place."""
        self._messages.append({"role": "assistant", "content": text})
        self._text += f"{text}\n"
        self._ids += ids or [self._settings.ids.low] * tokens

    def _new_ids(self, turn: Turn) -> list[int]:
        return token_ids(turn.blocks, self._seed, self._settings.ids)


@dataclass
class Heard:
    """The answer of one request."""

    text: str = ""
    ids: list[int] = field(default_factory=list)


async def send(
    session: aiohttp.ClientSession, server: Server, body: dict[str, Any], settings: Settings, sample: Sample
) -> Heard:
    """Sends one request and writes the measurements into `sample`. Never raises, except if it is cancelled."""
    heard, chunks, complete = Heard(), 0, False
    path = "/v1/chat/completions" if settings.endpoint == "chat" else "/v1/completions"
    began = time.perf_counter()
    try:
        timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
        async with session.post(f"{server.url}{path}", json=body, timeout=timeout) as response:
            if response.status != 200:
                text = " ".join((await response.text()).split())
                sample.error = f"HTTP {response.status}: {text}"[:MOST_ERROR_CHARS]
                return heard
            async for event in events(response):
                if error := event.get("error"):
                    sample.error = f"error in the stream: {json.dumps(error)[:MOST_ERROR_CHARS]}"
                    return heard
                complete = complete or event.get("done", False)
                for choice in event.get("choices") or ():
                    delta = choice.get("delta") or choice
                    text = delta.get("content") or delta.get("reasoning_content") or delta.get("text") or ""
                    heard.ids += choice.get("token_ids") or ()
                    if text or choice.get("token_ids"):
                        chunks += 1
                        heard.text += text
                        if sample.first_s is None:
                            sample.first_s = time.perf_counter() - began
                if usage := event.get("usage"):
                    sample.prompt_tokens = usage.get("prompt_tokens") or 0
                    sample.answer_tokens = usage.get("completion_tokens") or 0
                    sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        # A server without usage sends about one token in each event.
        sample.answer_tokens = sample.answer_tokens or chunks
        if not complete:
            sample.error = "the stream ended without [DONE]"
        elif sample.first_s is None:
            sample.error = "the answer has no text"
    except TimeoutError:
        sample.error = f"no complete answer within {settings.timeout_s:g} s"
    except (aiohttp.ClientError, OSError, ValueError, AttributeError, TypeError) as error:
        sample.error = f"{type(error).__name__}: {error}"[:MOST_ERROR_CHARS]
    finally:
        sample.total_s = time.perf_counter() - began
    return heard


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Yields the events of a stream, and `{"done": True}` for `[DONE]`. Raises `ValueError` for other data."""
    buffer = b""
    async for data in response.content.iter_any():
        buffer += data
        *lines, buffer = buffer.split(b"\n")
        if len(buffer) > MOST_LINE_BYTES:
            raise ValueError("a line of the stream is too long")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            text = line[5:].strip()
            event = {"done": True} if text == b"[DONE]" else json.loads(text)
            if not isinstance(event, dict):
                raise ValueError("an event of the stream is no object")
            yield event
