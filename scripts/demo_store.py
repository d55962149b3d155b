#!/usr/bin/env python3
"""Shows the storage architecture with four services: the proxy, a prefill instance, a decode instance and a store.

`make demo-store` runs this script in the Python environment that `make venv` makes. On the way the engines lose their
KV, and the store replaces what was lost. The exit code is 0 only if every token that the store had was loaded and not
computed, and if every text equals the text of an engine that computed the whole prompt.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("PD_BINARIES", str(ROOT / "target" / "release"))

from harness.client import Answer, complete
from harness.demo import exit_code
from harness.engine import Engine, wait_for
from harness.metrics import PromptTokens
from harness.model import KV_BYTES_PER_TOKEN, write_model
from harness.pair import Pair, PairOptions, pair_of
from harness.progress import Progress
from harness.prompts import prompt
from harness.store import Store

LOGS = ROOT / "target" / "demo-store-logs"
BLOCK = 32
MAX_TOKENS = 24
BOUND_S = 30.0


@dataclass
class Step:
    """One request. `kept` is the number of the prompt's tokens that only the store has."""

    title: str
    tokens: list[int]
    kept: int = 0


@dataclass
class Seen:
    """The measurements of one request."""

    answer: Answer
    prefill: PromptTokens
    decode: PromptTokens
    got_bytes: int
    handed_bytes: int


class Demo:
    """The four services, and the number of problems so far."""

    def __init__(self, pair: Pair, store: Store) -> None:
        self.pair, self.store = pair, store
        self.problems = 0

    def run(self, step: Step) -> list[int]:
        """Sends a request through the proxy, prints and checks what happened, and returns prompt and answer."""
        print(f"\n--- {step.title}")
        put = self._put_bytes()
        seen = self._ask(step.tokens)
        # Everything but the KV of the last token is put, in whole blocks, before the next step begins.
        self.settled(put + (kept_of(step.tokens + seen.answer.token_ids) - step.kept) * KV_BYTES_PER_TOKEN)
        # Because of the salt, the engine finds no KV, neither in its own cache nor in the store.
        salt = f"alone-{time.monotonic()}"
        alone = complete(self.pair.decode.url, step.tokens, max_tokens=MAX_TOKENS, cache_salt=salt, model="m")
        loader = seen.prefill if seen.handed_bytes else seen.decode
        rows = [
            ("prompt", f"{len(step.tokens)} tokens"),
            ("store", f"{loader.external} tokens loaded, {seen.got_bytes:,} bytes"),
            ("prefill", f"{seen.prefill.computed} tokens computed"),
            ("hand-over", f"{seen.handed_bytes:,} bytes"),
            ("decode", f"{seen.decode.computed} tokens computed"),
            ("first token", f"{seen.answer.first_s * 1e3:.0f} ms, whole answer {seen.answer.total_s * 1e3:.0f} ms"),
            (
                "text",
                "equal to an engine that computed all" if seen.answer.token_ids == alone.token_ids else "DIFFERENT",
            ),
        ]
        print("\n".join(f"    {name:<12} {value}" for name, value in rows))
        self._expect(seen.answer.token_ids == alone.token_ids, "the text differs")
        self._expect(loader.external == step.kept, f"{loader.external} tokens came from the store, not {step.kept}")
        wanted = step.kept * KV_BYTES_PER_TOKEN
        # vLLM's MultiConnector asks all connectors of the decode engine. So a decode engine may bring the same KV into
        # its host memory, although it gets it by a hand-over.
        right = wanted <= seen.got_bytes <= 2 * wanted
        self._expect(right, f"{seen.got_bytes} bytes left the store, not {wanted} or twice as many")
        self.settled(0)
        return step.tokens + seen.answer.token_ids

    def settled(self, put_bytes: float) -> None:
        """Waits until the store has received `put_bytes` since its start, and receives no more."""
        deadline, last = time.monotonic() + BOUND_S, -1.0
        while (now := self._put_bytes()) != last or now < put_bytes:
            assert time.monotonic() < deadline, f"the store has {now:,.0f} bytes and not {put_bytes:,.0f}"
            last = now
            time.sleep(0.5)

    def _put_bytes(self) -> float:
        return self.store.metrics().sum("pd_store_put_bytes")

    def forget(self, *engines: Engine) -> None:
        """Empties the caches of engines, and the host memory below them."""
        self.pair.wait_empty()
        for engine in engines:
            engine.reset_prefix_cache(external=True)

    def _ask(self, tokens: list[int]) -> Seen:
        pair = self.pair
        engines = [engine for engine in (pair.prefill, pair.decode) if engine.running]
        before = {engine.url: engine.prompt_tokens() for engine in engines}
        got = self.store.metrics().sum("pd_store_get_bytes")
        answer = pair.complete(tokens, max_tokens=MAX_TOKENS)
        counts = {
            engine.url: pair.prompt_tokens_since(before[engine.url], len(tokens), engine=engine) for engine in engines
        }
        record = pair.proxy.record(answer.headers["x-request-id"])
        nothing = PromptTokens(0, 0, 0)
        return Seen(
            answer,
            counts.get(pair.prefill.url, nothing),
            counts[pair.decode.url],
            int(self.store.metrics().sum("pd_store_get_bytes") - got),
            0 if record["alone"] else pair.sender.record(answer.headers["x-request-id"])["bytes"],
        )

    def _expect(self, right: bool, problem: str) -> None:
        if not right:
            print(f"    PROBLEM      {problem}")
            self.problems += 1


def kept_of(tokens: list[int]) -> int:
    """Returns the number of a conversation's tokens whose KV is put: the last token's KV was never computed."""
    return (len(tokens) - 1) // BLOCK * BLOCK


def show(demo: Demo, progress: Progress) -> None:
    pair = demo.pair
    title = "1. a new prompt: prefill computes it, decode gets it by a hand-over, both put it"
    said = demo.run(Step(title, prompt(600, seed=1)))

    demo.forget(pair.prefill, pair.decode)
    title = "2. the next turn, and both engines have lost everything: prefill loads the first turn"
    said = demo.run(Step(title, said + prompt(100, seed=2), kept_of(said)))

    demo.forget(pair.decode)
    progress.say("killing the prefill instance")
    pair.prefill.kill()
    pair.sender.kill()
    title = "3. the prefill instance is dead: decode loads from the store, and computes only what is new"
    said = demo.run(Step(title, said + prompt(100, seed=3), kept_of(said)))

    progress.say("starting a new prefill instance")
    pair.prefill.start()
    pair.sender.start()
    wait_for([pair.prefill])
    pair.wait_sidecars()
    demo.forget(pair.decode)
    title = "4. the new prefill instance has seen nothing: it loads all earlier turns"
    demo.run(Step(title, said + prompt(100, seed=4), kept_of(said)))


def main() -> int:
    progress = Progress()
    shutil.rmtree(LOGS, ignore_errors=True)
    progress.say("writing a small random model: its texts are nonsense, but every byte of its KV counts")
    model = write_model(ROOT / "target" / "model")
    store = Store(LOGS, "--memory", "256MiB")
    options = PairOptions(model, LOGS, decode_block=BLOCK, store=store, sidecar_keys={"park_ms": 3000})

    def run() -> bool:
        try:
            store.start()
            with pair_of(options, progress) as pair:
                demo = Demo(pair, store)
                show(demo, progress)
                progress.say("stopping everything")
        finally:
            store.stop()
        print(f"\n{f'{demo.problems} problems' if demo.problems else 'all right'}")
        return not demo.problems

    return exit_code(run, LOGS)


if __name__ == "__main__":
    sys.exit(main())
