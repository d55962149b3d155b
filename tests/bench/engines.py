"""Measures whole requests through two engines: this project against vLLM's NixlConnector.

Each request has a prompt of 1500 tokens and an answer of 24 tokens. All four engines run at the same time. Each of
vLLM's NIXL workers uses a whole core even when it is idle. So the benchmark stops one pair (SIGSTOP) while it measures
the other pair.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.client import complete, post_json
from harness.engine import Engine, EngineOptions, wait_for
from harness.model import write_model
from harness.pair import Pair, PairOptions, pair_of
from harness.ports import free_port
from harness.process import Part, group_members
from harness.progress import Progress
from harness.prompts import prompt
from harness.sidecar import ROOT

from bench.figures import Figures, Row, median

TOKENS = 1500
ANSWER = 24
TURNS = 5
ROUNDS = 4
IDLE_S = 10.0


class NixlPair:
    """Two engines with vLLM's own connector, and the two calls that vLLM's proxies make."""

    def __init__(self, model: Path, logs: Path) -> None:
        self.prefill, self.decode = (
            Engine(
                EngineOptions(
                    f"baseline {name}",
                    model,
                    block_size=32,
                    kv_transfer={"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"},
                    core=core,
                    env={
                        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
                    },
                ),
                logs,
            )
            for name, role, core in (("prefill", "kv_producer", 0), ("decode", "kv_consumer", 1))
        )

    def complete(self, tokens: list[int]) -> list[int]:
        request_id = uuid.uuid4().hex
        ask = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        }
        body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "ignore_eos": True, "kv_transfer_params": ask}
        answer = post_json(f"{self.prefill.url}/v1/completions", body)
        params = answer["kv_transfer_params"]
        return complete(
            self.decode.url, tokens, max_tokens=ANSWER, request_id=request_id, kv_transfer_params=params
        ).token_ids


def measure(figures: Figures, logs: Path) -> None:
    progress = Progress()
    model = write_model(ROOT / "target" / "model")
    baseline = NixlPair(model, logs)
    # Both pairs get the same settings: blocks of 32 tokens, and each prompt in one step.
    options = PairOptions(model, logs, decode_block=32, prefill_batched_tokens=None)
    with contextlib.ExitStack() as stack:
        theirs = (baseline.prefill, baseline.decode)
        for engine in theirs:
            stack.callback(engine.stop)
            engine.start()
        wait_for(theirs, progress)
        baseline.complete(prompt(50, seed=1))
        with _stopped(theirs):
            ours = stack.enter_context(pair_of(options, progress))
        _alternate(figures, ours, baseline, progress)
        with _stopped(theirs):
            _idle(figures, ours)


def _alternate(figures: Figures, ours: Pair, baseline: NixlPair, progress: Progress) -> None:
    mine: list[float] = []
    theirs: list[float] = []
    own_parts: tuple[Part, ...] = (ours.prefill, ours.decode, ours.sender, ours.receiver, ours.proxy)
    for turn in range(TURNS + 1):
        prompts = [prompt(TOKENS, seed=1000 + turn * (ROUNDS + 1) + round_) for round_ in range(ROUNDS + 1)]
        with _stopped((baseline.prefill, baseline.decode)):
            # After SIGCONT it takes a moment until the sidecars and the proxy report ready again.
            ours.wait_sidecars()
            answers, times = timed(lambda tokens: ours.complete(tokens, max_tokens=ANSWER).token_ids, prompts)
        with _stopped(own_parts):
            expect, base = timed(baseline.complete, prompts)
        assert answers == expect, "the two pairs gave different texts"
        if turn:  # The first turn warms up.
            # Do not count the first request of each turn, for either pair: it wakes the stopped processes.
            mine += times[1:]
            theirs += base[1:]
            progress.say(f"turn {turn}: ours {spread(times[1:])}, NixlConnector {spread(base[1:])}")
    moved = ours.sender.records()[-ROUNDS:]
    assert all(record["reason"] is None and record["bytes"] for record in moved)
    ratio = median(mine) / median(theirs)
    figures.flat["e2e_1500_tokens_ratio_to_nixl_connector"] = ratio
    figures.flat["e2e_1500_tokens_s"] = median(mine)
    figures.rows.append(
        Row(
            f"{TOKENS}-token prompt and {ANSWER} tokens through both engines, against vLLM's NixlConnector",
            f"{median(mine):.3f} s",
            f"{median(theirs):.3f} s",
            ratio,
            most=0.5,
        )
    )


def _idle(figures: Figures, ours: Pair) -> None:
    processes = [part.process for part in (ours.sender, ours.receiver) if part.process]
    before = [process.cpu_seconds() for process in processes]
    time.sleep(IDLE_S)
    used = max((process.cpu_seconds() - then) / IDLE_S for process, then in zip(processes, before, strict=True))
    figures.flat["idle_cpu_cores"] = used
    figures.rows.append(Row("one idle sidecar, linked", f"{used:.4f} cores", "0.01 cores", used / 0.01, most=1.0))


def timed(
    complete_one: Callable[[list[int]], list[int]], prompts: list[list[int]]
) -> tuple[list[list[int]], list[float]]:
    """Sends the prompts one after the other. Returns the answers and the seconds of each."""
    answers, times = [], []
    for tokens in prompts:
        began = time.perf_counter()
        answers.append(complete_one(tokens))
        times.append(time.perf_counter() - began)
    return answers, times


def spread(seconds: list[float]) -> str:
    return f"{median(seconds):.3f} s ({min(seconds):.3f}-{max(seconds):.3f})"


@contextlib.contextmanager
def _stopped(parts: tuple[Part, ...]) -> Iterator[None]:
    """Stops the processes of these parts (SIGSTOP) for the duration of the block."""
    pids = [pid for part in parts for pid in group_members(part.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
