"""The command line of `pd-bench`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pd_sidecar.bench.arrivals import KINDS
from pd_sidecar.bench.traces import FORMATS
from pd_sidecar.bench.workload import Span

if TYPE_CHECKING:
    from collections.abc import Callable

ABOUT = """\
Sends a load to a running OpenAI-compatible server, such as pd-proxy, and measures the answers: time to first token,
time per further token, throughput, and the share of requests that kept your goals.

  pd-bench run http://localhost:8000                           100 requests, 4 at a time
  pd-bench run http://localhost:8000 --rate 5 --number 300     Poisson arrivals, 5 per second
  pd-bench run pd=http://proxy:8000 plain=http://engine:8100 --html report.html
                                                               compares two servers with the same load
  pd-bench run http://localhost:8000 --turns 5                 conversations: later turns can reuse KV
  pd-bench run http://localhost:8000 --trace trace.jsonl --arrivals trace
                                                               replays a trace of Mooncake's format
  pd-bench report a.json b.json --html both.html               compares saved runs, such as two modes of one proxy
"""
EXITS = """\
exit codes: 0 all requests were answered, and --require is kept; 1 requests failed, or --require is not kept; 64 wrong
arguments or files; 69 a server cannot be reached; 130 interrupted (Ctrl-C): the report shows what ended before.
"""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all arguments."""
    form = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser("pd-bench", description=ABOUT, epilog=EXITS, formatter_class=form)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="send a load and report", description=ABOUT, epilog=EXITS, formatter_class=form
    )
    run.add_argument("servers", nargs="+", metavar="[NAME=]URL", help="base URL of a server; they are measured in turn")

    load = run.add_argument_group("load")
    load.add_argument(
        "--clients",
        type=whole_number,
        metavar="N",
        help="closed loop: N users, each sends after its last answer (default 4)",
    )
    load.add_argument(
        "--rate",
        type=positive,
        metavar="R",
        help="open loop: R conversations begin per second, even if the server is late",
    )
    load.add_argument(
        "--arrivals", choices=KINDS, help="with --rate: poisson (default) or fixed; trace: the times of --trace"
    )
    load.add_argument(
        "--speed", type=positive, default=1.0, metavar="X", help="with --arrivals trace: X times as fast (default 1)"
    )
    load.add_argument(
        "--number",
        type=whole_number,
        metavar="N",
        help="conversations per server and round (default 100, or the whole trace)",
    )
    load.add_argument(
        "--duration",
        type=seconds,
        metavar="TIME",
        help="begin no conversation after TIME, such as 60s; without --number until then",
    )
    load.add_argument(
        "--rounds", type=whole_number, default=1, metavar="N", help="measure each server N times, in turn (default 1)"
    )
    load.add_argument(
        "--warmup", type=natural, default=2, metavar="N", help="conversations that do not count (default 2)"
    )
    load.add_argument(
        "--seed",
        type=natural,
        default=0,
        metavar="N",
        help="lengths and arrivals follow from it; the tokens are new in each run",
    )

    prompts = run.add_argument_group(
        "prompts and answers", "lengths in tokens: N, or LOW:HIGH for even chances between"
    )
    prompts.add_argument(
        "--prompt-tokens",
        type=span,
        default=Span(1024, 1024),
        metavar="LENGTH",
        help="length of prompts (default 1024)",
    )
    prompts.add_argument(
        "--answer-tokens", type=span, metavar="LENGTH", help="length of answers (default 128, or as in the trace)"
    )
    prompts.add_argument(
        "--shared-tokens",
        type=natural,
        default=0,
        metavar="N",
        help="tokens that all prompts begin with, as a system prompt",
    )
    prompts.add_argument(
        "--turns", type=span, default=Span(1, 1), metavar="N", help="turns of a conversation (default 1)"
    )
    prompts.add_argument(
        "--turn-tokens",
        type=span,
        default=Span(100, 100),
        metavar="LENGTH",
        help="length of each later message (default 100)",
    )
    prompts.add_argument(
        "--think", type=seconds, default=0.0, metavar="TIME", help="pause of a user before a later turn (default 0s)"
    )
    prompts.add_argument(
        "--trace", type=Path, metavar="FILE", help="take the conversations from FILE (JSON or JSON lines)"
    )
    prompts.add_argument(
        "--format",
        choices=("auto", *FORMATS),
        default="auto",
        help="sharegpt: `conversations` or `messages`; mooncake: `hash_ids`",
    )
    prompts.add_argument(
        "--longest",
        type=whole_number,
        metavar="N",
        help="leave out conversations of a trace above N tokens, with the answers",
    )
    prompts.add_argument(
        "--ids",
        type=span,
        default=Span(1000, 10000),
        metavar="LOW:HIGH",
        help="token ids of synthetic prompts (default 1000:10000)",
    )

    server = run.add_argument_group("server")
    server.add_argument("--model", metavar="NAME", help="default: the first model of /v1/models")
    server.add_argument(
        "--endpoint", choices=("completions", "chat"), help="default: completions, but chat for traces with texts"
    )
    server.add_argument("--key-file", type=Path, metavar="FILE", help="API key; default: the variable OPENAI_API_KEY")
    server.add_argument(
        "--timeout", type=seconds, default=600.0, metavar="TIME", help="limit of one request (default 10m)"
    )
    server.add_argument(
        "--stop-early",
        action="store_true",
        help="do not send ignore_eos: for servers that refuse it; answers may be shorter",
    )

    goals = run.add_argument_group("goals", "a request is good if it keeps both")
    goals.add_argument("--goal-first", type=seconds, metavar="TIME", help="longest time to first token, such as 500ms")
    goals.add_argument(
        "--goal-token", type=seconds, metavar="TIME", help="longest mean time per further token, such as 50ms"
    )
    goals.add_argument(
        "--require", type=percent, metavar="PERCENT", help="exit code 1 if fewer requests are good at a server"
    )
    output(run)

    report = commands.add_parser(
        "report",
        help="make a report of saved runs",
        description="Reads files that `pd-bench run --json` has written, and reports all their servers side by side.",
    )
    report.add_argument("files", nargs="+", type=Path, metavar="FILE")
    output(report)
    return whole


def output(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("output", "the table goes to standard output, the progress to standard error")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    group.add_argument(
        "--html", type=Path, metavar="FILE", help="write a report with charts: one file, no network needed"
    )
    group.add_argument("--title", default="pd-bench", help="title of the report")
    group.add_argument("--quiet", action="store_true", help="show no progress")


def checked(is_right: Callable[[str], object], wanted: str) -> Callable[[str], object]:
    """Returns a type for argparse whose error says what is wanted."""

    def read(text: str) -> object:
        try:
            return is_right(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None

    return read


def _at_least(least: float, kind: type) -> Callable[[str], object]:
    def read(text: str) -> object:
        value = kind(text)
        if not least <= value < 1e12:
            raise ValueError(text)
        return value

    return read


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    if found is None:
        raise ValueError(text)
    return float(found[1]) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[found[2]]


def _percent(text: str) -> float:
    value = float(text.removesuffix("%"))
    if not 0 <= value <= 100:
        raise ValueError(text)
    return value / 100


span = checked(Span.parse, "a number N or LOW:HIGH")
whole_number = checked(_at_least(1, int), "a whole number from 1")
natural = checked(_at_least(0, int), "a whole number from 0")
positive = checked(_at_least(1e-6, float), "a number above 0")
seconds = checked(_seconds, "a time with a unit, such as 500ms, 30s or 2m")
percent = checked(_percent, "a percentage from 0 to 100")
