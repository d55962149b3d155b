#!/usr/bin/env python3
"""Shows the whole system with a few prompts: two real vLLM instances, a sidecar for each, and the proxy.

`make demo` runs this script in the Python environment that `make venv` makes. The exit code is 0 only if the KV of
every prompt was moved and used, and if every text equals the text of a single instance.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("PD_BINARIES", str(ROOT / "target" / "release"))

from harness.client import complete
from harness.demo import exit_code
from harness.model import KV_BYTES_PER_TOKEN, write_model
from harness.pair import Moved, Pair, PairOptions, pair_of
from harness.progress import Progress

LOGS = ROOT / "target" / "demo-logs"

MAX_TOKENS = 24

STORY = (
    "A prefill engine reads the whole prompt and writes down what it has understood of every word. "
    "A decode engine takes these notes and only has to continue. "
)

# The KV of the shortest prompt fits into one chunk (256 tokens); the longest prompts have several chunks. The last two
# prompts begin with the same text.
PROMPTS = (
    "The quick brown fox jumps over the lazy dog, and then",
    STORY * 3 + "In short,",
    STORY * 16 + "And so on. What follows is",
    STORY * 16 + "And so on. Something else is",
)


@dataclass
class Outcome:
    """The transfer of one prompt, and the answer of a single instance."""

    moved: Moved
    # Token ids of the answer of the prefill engine alone.
    alone: list[int]

    @property
    def problems(self) -> list[str]:
        """Returns the problems of this outcome; an empty list if there are none."""
        moved = self.moved
        tokens = moved.sender["tokens"]
        found = []
        if moved.answer.token_ids != self.alone:
            found.append("the text differs from the text of a single instance")
        for record, side in ((moved.sender, "sender"), (moved.receiver, "receiver")):
            if record["reason"] is not None:
                found.append(f"{side}: ended early, {record['reason']}")
        wanted = (tokens - moved.sender["have_tokens"]) * KV_BYTES_PER_TOKEN
        if moved.sender["bytes"] != wanted or moved.receiver["bytes"] != wanted:
            found.append(f"{moved.sender['bytes']} bytes sent, {moved.receiver['bytes']} received, expected {wanted}")
        if moved.tokens.computed > 1:
            found.append(f"the decode engine computed {moved.tokens.computed} tokens of the prompt itself")
        return found


def main() -> int:
    arguments = argparse.ArgumentParser(description="Two vLLM instances, two sidecars, one proxy, some prompts.")
    arguments.add_argument("--keep", action="store_true", help="leave all programs running at the end")
    arguments.add_argument(
        "--transport", choices=("auto", "nixl", "tcp"), default="auto", help="the sidecars' transport"
    )
    options = arguments.parse_args()

    progress = Progress()
    shutil.rmtree(LOGS, ignore_errors=True)
    progress.say("writing a small random model: its texts are nonsense, but every byte of its KV counts")
    model = write_model(ROOT / "target" / "model")
    pair_options = PairOptions(model, LOGS, transport=options.transport)

    def run() -> bool:
        with pair_of(pair_options, progress) as pair:
            outcomes = [show(pair, number, prompt) for number, prompt in enumerate(PROMPTS, start=1)]
            failed = report(outcomes)
            if options.keep:
                keep(pair)
            else:
                progress.say("stopping everything")
            return not failed

    return exit_code(run, LOGS)


def show(pair: Pair, number: int, prompt: str) -> Outcome:
    """Sends one prompt through the proxy and prints its text as it arrives. Then asks a single instance."""
    print(f"\n--- request {number}: {shortened(prompt)}\n    ", end="")
    moved = pair.move(prompt, max_tokens=MAX_TOKENS, on_text=live, model="m")
    # Because of the salt, the prefill engine cannot use its prefix cache, and computes the whole prompt again.
    alone = complete(pair.prefill.url, prompt, max_tokens=MAX_TOKENS, cache_salt=f"alone-{number}", model="m")
    outcome = Outcome(moved, alone.token_ids)
    print("\n" + table(pair, outcome))
    return outcome


def table(pair: Pair, outcome: Outcome) -> str:
    moved = outcome.moved
    sender, receiver = moved.sender, moved.receiver
    link = link_of(pair.sender.status())
    gb_s = sender["bytes"] / sender["push_us"] / 1e3 if sender["push_us"] else 0.0
    rows = [
        ("prompt", f"{sender['tokens']} tokens, the decode side already had {sender['have_tokens']} of them"),
        ("moved", f"{sender['chunks']} chunks, {sender['bytes']:,} bytes"),
        ("alloc", milliseconds(sender["alloc_us"])),
        ("gather", milliseconds(sender["gather_us"])),
        ("push", milliseconds(sender["push_us"])),
        ("ready", milliseconds(receiver["ready_us"]) + " after the decode engine had parked the request"),
        ("scatter", milliseconds(receiver["scatter_us"])),
        ("first token", f"{moved.answer.first_s * 1e3:.1f} ms, whole answer {moved.answer.total_s * 1e3:.1f} ms"),
        ("transport", f"configured: {link['configured']}, reported: {link['reported']}, measured: {gb_s:.2f} GB/s"),
        ("decode side", f"computed {moved.tokens.computed} tokens of the prompt itself"),
        ("text", "equal to the text of a single instance" if moved.answer.token_ids == outcome.alone else "DIFFERENT"),
    ]
    return "\n".join(f"    {name:<12} {value}" for name, value in rows)


def link_of(status: dict[str, Any]) -> dict[str, Any]:
    """Returns the sender's report about the link to its only receiver."""
    links: list[dict[str, Any]] = status["links"]
    return links[0] if links else {"configured": "?", "reported": "no link"}


def report(outcomes: list[Outcome]) -> int:
    """Prints the problems of all requests and a summary. Returns the number of requests with a problem."""
    failed = 0
    print()
    for number, outcome in enumerate(outcomes, start=1):
        for problem in outcome.problems:
            print(f"request {number}: {problem}")
        failed += bool(outcome.problems)
    moved = sum(outcome.moved.sender["bytes"] for outcome in outcomes)
    right = len(outcomes) - failed
    print(f"{right} of {len(outcomes)} requests: KV moved ({moved:,} bytes in all), used, and the right text")
    return failed


def keep(pair: Pair) -> None:
    """Leaves all processes running and prints how to use and stop them."""
    groups = pair.leave_running()
    print(
        f"""
Left running. Try:
  curl -N {pair.proxy.url}/v1/completions -H 'content-type: application/json' \\
       -d '{{"model": "m", "prompt": "Hello", "max_tokens": 16, "stream": true}}'
  curl {pair.proxy.url}/instances            # the registered instances
  curl {pair.proxy.url}/requests             # the last requests, as the proxy saw them
  curl {pair.sender.admin}/requests            # the same of the sender, with bytes and times
  curl {pair.receiver.admin}/requests            # the same of the receiver
  curl {pair.receiver.admin}/status              # slots and links
  curl {pair.sender.admin}/metrics             # Prometheus
Logs: {LOGS}
Stop all of it:
  kill -- {" ".join(f"-{group}" for group in groups)}"""
    )


def live(text: str) -> None:
    """Prints text as it arrives, all on one line."""
    print(text.replace("\n", "\\n").replace("\r", "\\r"), end="", flush=True)


def shortened(text: str) -> str:
    return text if len(text) <= 70 else f"{text[:48]} ... {text[-18:]}"


def milliseconds(us: int) -> str:
    return f"{us / 1e3:.2f} ms"


if __name__ == "__main__":
    sys.exit(main())
