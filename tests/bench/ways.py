"""Measures the hand-over modes: the time of the decode leg, and the source of the first token."""

from __future__ import annotations

import json
import random
from pathlib import Path

from harness.client import complete
from harness.model import write_model
from harness.pair import PairOptions, pair_of
from harness.progress import Progress
from harness.prompts import prompt
from harness.sidecar import ROOT

from bench.figures import Figures, Row, median

WAYS = {
    "begun": [],
    "arrival": ["--decode-leg", "arrival"],
    "answer": ["--decode-leg", "answer"],
    "first_token": ["--first-token", "prefill"],
}
LENGTHS = (300, 1500)
ANSWER = 24
ROUNDS = 3
REQUESTS = 4


def measure(figures: Figures, logs: Path) -> None:
    progress = Progress()
    options = PairOptions(write_model(ROOT / "target" / "model"), logs, decode_block=32, prefill_batched_tokens=None)
    first: dict[tuple[str, int], list[float]] = {(way, length): [] for way in WAYS for length in LENGTHS}
    total: dict[tuple[str, int], list[float]] = {key: [] for key in first}
    seeds = iter(range(5000, 10_000))
    with pair_of(options, progress) as pair:
        for round_ in range(ROUNDS):
            order = list(WAYS)
            random.Random(round_).shuffle(order)
            for way in order:
                with pair.proxy.flags(*WAYS[way]):
                    pair.wait_sidecars()
                    for length in LENGTHS:
                        for number in range(REQUESTS + 1):
                            answer = complete(
                                pair.proxy.url,
                                prompt(length, seed=next(seeds)),
                                max_tokens=ANSWER,
                                # If the client asks for token ids, the first token cannot come from prefill.
                                return_token_ids=False,
                            )
                            if number:
                                first[way, length].append(answer.first_s)
                                total[way, length].append(answer.total_s)
            progress.say(f"round {round_ + 1} of {ROUNDS}")
        alone = [record["alone"] for record in pair.proxy.records()]
        assert not any(alone), alone
    for way, length in first:
        for name, times in (("first", first), ("total", total)):
            key = f"way_{way}_{length}_{name}"
            mine, usual = median(times[way, length]), median(times["begun", length])
            figures.flat[f"{key}_ms"] = mine * 1e3
            if way != "begun":
                text = f"{name}, {length} tokens, {way} against begun"
                figures.rows.append(Row(text, f"{mine * 1e3:.1f} ms", f"{usual * 1e3:.1f} ms", mine / usual))
    text = json.dumps({key: round(value, 2) for key, value in figures.flat.items() if key.startswith("way_")}, indent=2)
    (ROOT / "target" / "ways-bench.json").write_text(text + "\n")
