"""The program `pd-bench`."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import secrets
import signal
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import aiohttp

from pd_sidecar.bench import saved, table, traces
from pd_sidecar.bench.arguments import parser
from pd_sidecar.bench.arrivals import Arrivals
from pd_sidecar.bench.client import Server, Settings
from pd_sidecar.bench.html import report
from pd_sidecar.bench.run import Load, Plan
from pd_sidecar.bench.samples import Goals, Result
from pd_sidecar.bench.workload import BadInputError, Conversation, Span, Synthetic

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from pathlib import Path

DONE, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 64, 69, 130

LATE_MS = 20.0
"""With a higher p99 of its own delay, this program cannot keep up with the load, and the times are too long."""


def run(words: list[str]) -> int:
    """Runs a command line. Returns the exit code."""
    try:
        given = parser().parse_args(words)
    except SystemExit as end:  # argparse has printed its help (0) or the error (2)
        return USAGE if end.code else DONE
    try:
        return report_files(given) if given.command == "report" else measure(given)
    except BadInputError as error:
        say(f"pd-bench: {error}")
        return USAGE
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        say(f"pd-bench: {error or type(error).__name__}")
        return UNREACHABLE


def measure(given: argparse.Namespace) -> int:
    """Runs a load. Returns the exit code."""
    servers, key = named_servers(given.servers), api_key(given.key_file)
    plan, settings = plan_of(given)
    goals = Goals(given.goal_first, given.goal_token)
    for file in (given.json, given.html):
        # A run of an hour must not end with a report that cannot be written.
        if file is not None:
            check_writable(file)
    load = Load(plan, [Server(name, url, key) for name, url in servers], secrets.token_hex(4), progress(given.quiet))
    asyncio.run(until_done(load, settings, bool(given.model)))
    about = {
        "command": "pd-bench " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        **{f"server {result.name}": result.url for result in load.results},
    }
    written = write(given, about, goals, load.results, interrupted=load.interrupted)
    if load.interrupted:
        return INTERRUPTED
    bad = any(each["failed"] or not each["requests"] for each in written)
    bad = bad or any(given.require is not None and (each["goals_kept"] or 0) < given.require for each in written)
    return FAILED if bad else DONE


async def until_done(load: Load, settings: Settings, has_model: bool) -> None:
    """Asks the servers for their models, and runs the load. Ctrl-C ends the load, and a second Ctrl-C the program."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        load.stop()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    loop.add_signal_handler(signal.SIGTERM, interrupted)
    of_server: dict[str, Settings] = {}
    for server in load.servers:
        async with server.session() as session:
            model = settings.model if has_model else await server.model(session)
            of_server[server.name] = replace(settings, model=model)
    await load.run(of_server)


def check_writable(file: Path) -> None:
    """Raises `BadInputError` if the file cannot be written. A file that exists keeps its text until the end."""
    try:
        with file.open("a"):
            pass
    except OSError as error:
        raise BadInputError(f"cannot write {file}: {error.strerror}") from error


def named_servers(words: list[str]) -> list[tuple[str, str]]:
    """Reads `[NAME=]URL`. Without a name, the URL is the name. Raises `BadInputError`."""
    servers = []
    for word in words:
        name, equals, url = word.partition("=") if "=" in word.partition("://")[0] else ("", "", word)
        if not url.startswith(("http://", "https://")):
            raise BadInputError(f"{word!r}: a server is [NAME=]URL, such as pd=http://localhost:8000")
        servers.append((name if equals else url, url))
    names = [name for name, _ in servers]
    if len(set(names)) != len(names):
        raise BadInputError(f"two servers have the same name: {', '.join(names)}; give names: a=URL b=URL")
    return servers


def api_key(file: Path | None) -> str | None:
    """Returns the API key of a file, or of the variable OPENAI_API_KEY. Raises `BadInputError`."""
    if file is None:
        return os.environ.get("OPENAI_API_KEY")
    try:
        return file.read_text(encoding="utf-8").split()[0]
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise BadInputError(f"--key-file {file}: {error}") from error


def plan_of(given: argparse.Namespace) -> tuple[Plan, Settings]:
    """Returns the load of a command line, and the form of its requests. Raises `BadInputError`."""
    if given.clients is not None and (given.rate is not None or given.arrivals is not None):
        raise BadInputError("--clients is a closed loop; --rate and --arrivals are an open loop: choose one")
    recorded = trace(given) if given.trace is not None else []
    arrivals = None
    if given.arrivals == "trace":
        if not recorded or recorded[0].at_s is None:
            raise BadInputError("--arrivals trace needs a --trace whose entries have a `timestamp`")
        arrivals = Arrivals("trace", speed=given.speed)
    elif given.rate is not None:
        arrivals = Arrivals(given.arrivals or "poisson", rate=given.rate)
    elif given.arrivals is not None:
        raise BadInputError(f"--arrivals {given.arrivals} needs --rate")
    if given.shared_tokens >= given.prompt_tokens.low and given.shared_tokens and not recorded:
        raise BadInputError(f"--shared-tokens must be below --prompt-tokens, which is {given.prompt_tokens.low}")
    made = Synthetic(
        given.prompt_tokens, given.answer_tokens or Span(128, 128), given.turns, given.turn_tokens, given.shared_tokens
    )

    def conversations(seed: int) -> Iterator[Conversation]:
        return iter(recorded) if recorded else made.conversations(seed)

    number = given.number
    if number is None and given.duration is None:
        number = len(recorded) or 100
    plan = Plan(
        conversations, number, given.duration, arrivals, given.clients or 4, given.warmup, given.rounds, given.think,
        given.seed,
    )  # fmt: skip
    has_texts = any(turn.text for conversation in recorded for turn in conversation.turns)
    endpoint = given.endpoint or ("chat" if has_texts else "completions")
    return plan, Settings(given.model or "", endpoint, given.ids, not given.stop_early, given.timeout)


def trace(given: argparse.Namespace) -> list[Conversation]:
    """Reads the trace, leaves out what is too long, and sets the lengths of answers. Raises `BadInputError`."""
    recorded = traces.read(given.trace, given.format)
    if given.answer_tokens is not None:
        chance = random.Random(given.seed)
        recorded = [
            replace(
                each,
                turns=tuple(replace(t, answer_tokens=max(1, given.answer_tokens.choose(chance))) for t in each.turns),
            )
            for each in recorded
        ]
    kept = [each for each in recorded if given.longest is None or each.longest <= given.longest]
    if len(kept) < len(recorded):
        say(f"pd-bench: {len(recorded) - len(kept)} of {len(recorded)} conversations are above --longest and left out")
    if not kept:
        raise BadInputError(f"{given.trace}: all conversations are above --longest {given.longest}")
    return list(itertools.islice(kept, given.number))


def report_files(given: argparse.Namespace) -> int:
    """Reports saved runs. Returns the exit code."""
    about: dict[str, str] = {}
    results: list[Result] = []
    goals = Goals()
    for file in given.files:
        of_file, goals, found = saved.read(file)
        about |= {f"{key} ({file.name})": value for key, value in of_file.items()}
        taken = {result.name for result in results}
        for result in found:
            name = f"{result.name} ({file.stem})" if result.name in taken or len(given.files) > 1 else result.name
            results.append(replace(result, name=name))
    write(given, about, goals, results, interrupted=False)
    return DONE


def write(
    given: argparse.Namespace, about: dict[str, str], goals: Goals, results: list[Result], *, interrupted: bool
) -> list[table.Figures]:
    """Writes the table and the files. Returns the figures of each server."""
    document = saved.document(about, goals, results, interrupted=interrupted)
    figures: list[table.Figures] = [server["figures"] for server in document["servers"]]
    warnings = ["The run was interrupted: the figures count only the requests that had ended."] if interrupted else []
    for result, each in zip(results, figures, strict=True):
        if each["late_ms"] and each["late_ms"]["p99"] > LATE_MS:
            warnings.append(
                f"{result.name}: pd-bench itself was late by {each['late_ms']['p99']:.0f} ms (p99). Give it more CPU "
                "time, or lower --rate: the server is better than these times."
            )
    sys.stdout.write(table.text([result.name for result in results], figures))
    for warning in warnings:
        say(f"pd-bench: {warning}")
    if given.json is not None:
        given.json.write_text(json.dumps(document) + "\n", encoding="utf-8")
    if given.html is not None:
        given.html.write_text(report(given.title, about, warnings, results, figures), encoding="utf-8")
    return figures


def progress(quiet: bool) -> Callable[[str], None]:
    """Returns a function that shows a line of progress."""
    return (lambda line: None) if quiet else say


def say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
