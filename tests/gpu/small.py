"""Helpers for tests with engines: a small model whose texts depend on KV, and the start of stacks."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.engine import wait_for
from harness.process import ended_by_signals
from harness.sidecar import CHUNK_TOKENS, ROOT

from gpu.model import write_model
from gpu.setting import ON_CPU, Setting
from gpu.stacks import Ours, Stack
from gpu.texts import DTYPE

VOCABULARY = 2000 if ON_CPU else 32000
CHUNKED = "1024"


def small(folder: Path, gpus: tuple[int, int], chunks: int, shape: str = "small", **more: Any) -> Setting:
    """Returns settings for a small model and buffers of `chunks` chunks.

    The prefill engine uses chunked prefill and blocks of 16 tokens; the decode engine uses blocks of 64 tokens.
    """
    values: dict[str, Any] = {
        "folder": folder,
        "buffer_bytes": 0,
        "model_tokens": 4096,
        "side_flags": (("--max-num-batched-tokens", CHUNKED), ("--block-size", "64")),
        "push": "layers",
    }
    if ON_CPU:
        from harness.model import write_model as write_tiny

        model = write_tiny(ROOT / "target" / "model")
        if shape != "small":
            model = write_model(folder / "model", shape, "float32", weights=True)
        flags = ("--kv-cache-memory-bytes", str(256 << 20))
        values |= {"model": model, "gpus": None, "block_tokens": 32, "engine_flags": flags}
    else:
        values |= {
            "model": write_model(folder / "model", shape, DTYPE, weights=True),
            "gpus": gpus,
            "kv_bytes": 1 << 30,
            "utilization": 0.05,
            "engine_flags": ("--enforce-eager", "--max-num-seqs", "64"),
        }
    values |= more
    setting = Setting(shape=shape, **values)
    shutil.rmtree(setting.logs, ignore_errors=True)
    return Setting(**{**vars(setting), "buffer_bytes": chunks * CHUNK_TOKENS * setting.token_bytes})


@contextlib.contextmanager
def serving(*stacks: Stack) -> Iterator[None]:
    """Starts all stacks at the same time. All of them serve inside the block and stop at its end."""
    with ended_by_signals():
        try:
            for stack in stacks:
                stack.start()
            for stack in stacks:
                wait_for(stack.engines)
                stack.wait()
            yield
        finally:
            for stack in stacks:
                for part in stack.parts:
                    part.stop()
                if isinstance(stack, Ours):
                    stack.close()
