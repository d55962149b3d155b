"""Measures the cost of hand-overs for running answers: the decode side's time per output token while KV arrives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import aiohttp

from gpu import measure
from gpu.stacks import REQUEST_S, Handover, Pair, client, stream

STREAMS = 8
PROMPT_TOKENS = 64
INTERVAL_S = 0.4
"""Time between the starts of two hand-overs. Even the slowest stack needs less time, so all stacks do the same work."""


async def tpot(stacks: Sequence[Pair], answer: int, prompts: measure.Prompts, say: measure.Say) -> Any:
    """Measures several long answers of each decode engine, first without other work, then during hand-overs."""
    results: dict[str, Any] = {}
    for stack in stacks:
        found: dict[str, Any] = {"failed": 0, "failures": []}
        async with client() as session:
            for name in ("idle", "busy"):
                times, moved, failures = await _round(stack, session, answer, prompts, beside=name == "busy")
                found["failures"] += failures
                found[name] = {
                    "per_token_ms_p50": round(measure.quantile(times, 0.5) * 1e3, 3),
                    "per_token_ms_p99": round(measure.quantile(times, 0.99) * 1e3, 3),
                    "tokens": len(times),
                    "handovers": moved,
                }
        found["failed"] = len(found["failures"])
        results[stack.name] = found
        say(f"tpot, {stack.name}: {found}")
    _compare(results)
    return results


async def _round(
    stack: Pair, session: aiohttp.ClientSession, answer: int, prompts: measure.Prompts, *, beside: bool
) -> tuple[list[float], int, list[str]]:
    """Returns the times between tokens, the number of hand-overs during that time, and the failures."""
    asks = [
        asyncio.create_task(stream(session, stack.decode.url, prompts.next(PROMPT_TOKENS), answer))
        for _ in range(STREAMS)
    ]
    done: list[Handover] = []
    failures: list[str] = []

    async def arrive() -> None:
        try:
            while True:
                next_one = asyncio.create_task(asyncio.sleep(INTERVAL_S))
                done.append(await stack.complete(session, prompts.next(measure.LOAD_TOKENS), 2))
                await next_one
        except (OSError, RuntimeError, TimeoutError, aiohttp.ClientError) as error:
            failures.append(repr(error)[:200])

    arriving = asyncio.create_task(arrive()) if beside else None
    ended = await asyncio.gather(*asks, return_exceptions=True)
    moved = len(done)
    if arriving is not None:
        # Let the last hand-over end, because an abort would be extra work for the measured engines.
        await _until_one_more(done, moved, arriving)
        if len(done) == moved and not failures:
            failures.append(f"a hand-over was not done in {REQUEST_S:g} s")
        arriving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await arriving
    failures += [repr(result)[:200] for result in ended if not isinstance(result, Handover)]
    answers = [result for result in ended if isinstance(result, Handover)]
    return [b - a for of in answers for a, b in pairwise(of.times)], moved, failures


async def _until_one_more(done: Sequence[Handover], moved: int, arriving: asyncio.Task[None]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(REQUEST_S):
            while len(done) == moved and not arriving.done():
                await asyncio.sleep(0.005)


def _compare(results: dict[str, Any]) -> None:
    """Adds the ratio between this project and the best baseline that had no failures."""
    others = [of["busy"] for name, of in results.items() if not name.startswith("ours") and not of["failed"]]
    if "ours" in results and others:
        for key in ("per_token_ms_p50", "per_token_ms_p99"):
            best = min(of[key] for of in others)
            results["ours"][f"{key}_ratio"] = round(results["ours"]["busy"][key] / best, 3) if best else None
