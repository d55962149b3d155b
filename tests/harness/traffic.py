"""Sends requests from several clients without a pause while a test stops or restarts processes."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from http.client import HTTPException
from typing import Self

from harness.client import Answer, HttpError
from harness.pair import Pair
from harness.prompts import prompt

# Prompt lengths: less than one chunk of 256 tokens, and several chunks.
LENGTHS = (200, 600, 1200)

# Pause of a client before its next request, in seconds, if its last request was refused.
ERROR_PAUSE_S = 0.2


@dataclass(frozen=True)
class Result:
    """The outcome of one request."""

    prompt: list[int]
    began: float
    seconds: float
    # The answer; None if the client got an error (an HTTP status, or an error event in the stream).
    answer: Answer | None
    error: str | None


class Traffic:
    """Several clients. Inside the `with` block each client sends one request after the other, all with different
    prompts.
    """

    def __init__(self, pair: Pair, *, clients: int, seed: int, bound_s: float, max_tokens: int = 16) -> None:
        self.results: list[Result] = []
        self._pair = pair
        self._seed = seed
        self._bound_s = bound_s
        self._max_tokens = max_tokens
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._next = 0
        self._broken: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops new requests and waits for the running ones. Fails the test if a request takes too long."""
        self._stop.set()
        deadline = time.monotonic() + self._bound_s + 5
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hung = [thread for thread in self._threads if thread.is_alive()]
        assert not hung, f"{len(hung)} requests did not end within {self._bound_s:g} s"
        if self._broken:
            raise self._broken[0]

    def wait_for(self, count: int, timeout_s: float = 60.0) -> None:
        """Returns when `count` more requests have ended."""
        wanted = len(self.results) + count
        deadline = time.monotonic() + timeout_s
        while len(self.results) < wanted:
            assert time.monotonic() < deadline, (
                f"only {len(self.results)} of {wanted} requests ended in {timeout_s:g} s"
            )
            time.sleep(0.01)

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                number = self._next
                self._next += 1
            try:
                result = self._one(prompt(LENGTHS[number % len(LENGTHS)], seed=self._seed * 10_000 + number))
                if result.error:
                    time.sleep(ERROR_PAUSE_S)
            except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
                self._broken.append(error)
                return

    def _one(self, tokens: list[int]) -> Result:
        began = time.monotonic()
        answer, error = None, None
        try:
            answer = self._pair.complete(tokens, max_tokens=self._max_tokens, timeout_s=self._bound_s)
        except HttpError as refusal:
            error = str(refusal)
        except (OSError, HTTPException) as breach:
            # The client got neither an answer nor a readable error, which is a fault, whichever process has died.
            raise AssertionError(
                f"a request ended without an answer after {time.monotonic() - began:.1f} s"
            ) from breach
        result = Result(tokens, began, time.monotonic() - began, answer, error)
        with self._lock:
            self.results.append(result)
        return result
