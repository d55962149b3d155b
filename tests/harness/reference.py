"""What a plain instance answers: the text that a transfer must not change."""

from __future__ import annotations

import json
import threading
from typing import Any

from harness.client import complete, post_json
from harness.engine import Engine


class Reference:
    """A plain instance, without connector and without prefix cache, that remembers its answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._answers: dict[str, list[int]] = {}
        self._asking = threading.Lock()

    def token_ids(self, prompt: list[int], *, max_tokens: int = 24, **more: Any) -> list[int]:
        """The greedy continuation."""
        key = json.dumps([prompt, max_tokens, more], sort_keys=True)
        # One at a time: the answer of an idle instance is what counts.
        with self._asking:
            if key not in self._answers:
                self._answers[key] = complete(self.engine.url, prompt, max_tokens=max_tokens, **more).token_ids
            return self._answers[key]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Any other request, as JSON."""
        with self._asking:
            return post_json(self.engine.url + path, body)
