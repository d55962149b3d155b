"""Returns the answers of an instance without a connector. A transfer must not change these texts."""

from __future__ import annotations

import json
import threading
from typing import Any

from harness.client import Answer, complete, post_json
from harness.engine import Engine


class Reference:
    """An instance without connector and prefix cache. Answers are kept, so each prompt is computed once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._answers: dict[str, Answer] = {}
        self._asking = threading.Lock()

    def token_ids(self, prompt: list[int], *, max_tokens: int = 24, **more: Any) -> list[int]:
        """Returns the greedy continuation of a prompt."""
        return self.answer(prompt, max_tokens=max_tokens, **more).token_ids

    def answer(self, prompt: list[int], *, max_tokens: int = 24, **more: Any) -> Answer:
        """Returns the greedy continuation of a prompt, as a whole answer."""
        key = json.dumps([prompt, max_tokens, more], sort_keys=True)
        # Send one request at a time, because requests in one batch can change each other's rounding errors.
        with self._asking:
            if key not in self._answers:
                self._answers[key] = complete(self.engine.url, prompt, max_tokens=max_tokens, **more)
            return self._answers[key]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Sends any other request and returns its JSON answer."""
        with self._asking:
            return post_json(self.engine.url + path, body)
