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
_has_one_worker = os.environ.get("PD_TEST_WORKERS") == "1"


def _forking(method: str | None = None) -> BaseContext:
    # The engine process has threads when it starts several tensor-parallel workers. A fork could find a lock of these
    # threads taken and wait for ever, so the workers are new interpreters.
    forks = _has_one_worker or os.getpid() == _api_server
    return _get_context("fork" if method == "spawn" and forks else method)


multiprocessing.get_context = _forking  # type: ignore[assignment]
