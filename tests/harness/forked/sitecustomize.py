"""Makes vLLM's engine process a fork of its API server. Used for engines with `EngineOptions.forked`.

vLLM's CPU build starts the engine process as a new interpreter, which imports torch and vLLM a second time. On two
cores these imports take more than half of an engine's start. On a GPU vLLM forks by default.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import BaseContext

_get_context = multiprocessing.get_context
_api_server = os.getpid()


def _forking(method: str | None = None) -> BaseContext:
    # The engine process has threads when it starts the workers of a tensor-parallel engine. A fork could find one of
    # their locks taken and wait for ever, so these workers are new interpreters.
    return _get_context("fork" if method == "spawn" and os.getpid() == _api_server else method)


multiprocessing.get_context = _forking  # type: ignore[assignment]
