"""Makes vLLM's engine process a fork of its API server. Used for engines with `EngineOptions.forked`.

vLLM's CPU build starts the engine process as a new interpreter, which imports torch and vLLM a second time. On two
cores these imports take more than half of an engine's start. On a GPU vLLM forks by default.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import BaseContext

_get_context = multiprocessing.get_context


def _forking(method: str | None = None) -> BaseContext:
    return _get_context("fork" if method == "spawn" else method)


multiprocessing.get_context = _forking  # type: ignore[assignment]
