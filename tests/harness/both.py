"""Starts one plain vLLM, and a pair behind a proxy with the same weights and flags, for programs that compare them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.engine import Engine, EngineOptions, wait_for
from harness.logs import LOGS
from harness.model import write_lora, write_model
from harness.pair import Pair, PairOptions, pair_of
from harness.process import ended_by_signals
from harness.progress import Progress
from harness.sidecar import ROOT


@dataclass(frozen=True)
class Both:
    """A plain engine, and a pair that has the same model."""

    plain: Engine
    pair: Pair
    model: Path


@contextlib.contextmanager
def both(flags: Sequence[str] = (), *, lora: str | None = "lora") -> Iterator[Both]:
    """Yields both when they serve. `flags` are further flags of all engines; `lora` names the adapter, if any."""
    LOGS.mkdir(parents=True, exist_ok=True)
    model = write_model(ROOT / "target" / "model")
    adapters = {lora: write_lora(ROOT / "target" / "lora")} if lora else {}
    plain = Engine(EngineOptions("plain engine", model, lora=adapters, forked=True, more=flags), LOGS)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        stack.callback(plain.stop)
        progress = Progress()
        plain.start()
        options = PairOptions(model, LOGS, forked=True, lora=adapters, more=tuple(flags))
        pair = stack.enter_context(pair_of(options, progress))
        wait_for([plain], progress)
        yield Both(plain, pair, model)
