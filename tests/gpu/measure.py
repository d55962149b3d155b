"""The measurements. Each measurement gives the same prompts to all stacks."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from bench.figures import median

from gpu.setting import Setting
from gpu.stacks import FIRST_REQUEST_S, REQUEST_S, Handover, Ours, Stack, client

ANSWER = 16
LOAD_ANSWER = 64
LOAD_TOKENS = 5000
PAUSE_S = 0.3
Say = Callable[[str], None]


class Prompts:
    """Random prompts; no two are equal."""

    def __init__(self, seed: int, vocabulary: int) -> None:
        self._draw = random.Random(seed)
        self._vocabulary = vocabulary

    def next(self, tokens: int) -> list[int]:
        return [self._draw.randrange(3, self._vocabulary) for _ in range(tokens)]


def quantile(values: Sequence[float], share: float) -> float:
    """Returns a quantile, or 0 if there are no values, for example for a stack without a finished request."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


async def latency(stacks: Sequence[Stack], lengths: Sequence[int], rounds: int, prompts: Prompts, say: Say) -> Any:
    """Measures one request at a time. In each round every stack gets the same prompt; the first round warms up.

    There is the same pause before each request, and the order of the stacks changes each round. Without the pause, a
    prefill directly after another prefill on the same GPU took up to 3 % longer, most likely because of the GPU's power
    limit.
    """
    results: dict[str, Any] = {stack.name: {} for stack in stacks}
    failed: dict[str, str] = {}
    order = random.Random(len(stacks))
    async with client(FIRST_REQUEST_S) as session:
        for tokens in lengths:
            rows: dict[str, list[Handover]] = {stack.name: [] for stack in stacks}
            prefill = {stack.name: _prefill_s(stack) for stack in stacks}
            for turn in range(rounds + 1):
                prompt = prompts.next(tokens)
                for stack in order.sample(stacks, len(stacks)):
                    if stack.name not in failed:
                        await asyncio.sleep(PAUSE_S)
                        try:
                            async with asyncio.timeout(REQUEST_S if turn else FIRST_REQUEST_S):
                                rows[stack.name].append(await stack.complete(session, prompt, ANSWER))
                        except (OSError, RuntimeError, TimeoutError, aiohttp.ClientError) as error:
                            failed[stack.name] = f"{type(error).__name__}: {error}"[:300]
            for stack in stacks:
                own = rows[stack.name]
                results[stack.name][str(tokens)] = {
                    "first_ms": [round(row.first_s * 1e3, 2) for row in own[1:]],
                    "first_ms_median": _ms([row.first_s for row in own[1:]]),
                    "second_after_first_ms_median": _ms([row.times[1] - row.times[0] for row in own[1:]]),
                    "per_token_ms_median": _ms([row.per_token_s for row in own[1:]]),
                    "prefill_step_ms_mean": _mean_ms(prefill[stack.name], _prefill_s(stack)),
                    "parts_ms_median": {
                        part: _ms([row.parts[part] for row in own[1:]]) for part in (own[0].parts if own else ())
                    },
                    "texts_as_first_stack": sum(
                        row.text == other.text for row, other in zip(own, rows[stacks[0].name], strict=False)
                    ),
                    "requests": len(own),
                    "failure": failed.get(stack.name),
                }
                of = results[stack.name][str(tokens)]
                say(
                    f"{tokens} tokens, {stack.name}: first {of['first_ms_median']} ms, "
                    f"second {of['second_after_first_ms_median']} ms later, "
                    f"{of['texts_as_first_stack']}/{of['requests']} texts equal {of['failure'] or ''}"
                )
    return results


async def warm_up(stack: Stack, prompts: Prompts) -> None:
    """Sends two requests, so that new engines connect and compile before the measurement."""
    async with client(FIRST_REQUEST_S) as session:
        for _ in range(2):
            await stack.complete(session, prompts.next(LOAD_TOKENS), ANSWER)


async def alone(plain: Stack, prompts: Prompts) -> float:
    """Returns the milliseconds to the first token of one idle instance."""
    async with client() as session:
        return _ms([(await plain.complete(session, prompts.next(LOAD_TOKENS), 2)).first_s for _ in range(4)][1:])


async def burst(stacks: Sequence[Stack], at_once: int, rounds: int, alone_ms: float, prompts: Prompts, say: Say) -> Any:
    """Measures `at_once` prompts that arrive at the same moment, in several rounds."""
    results = {}
    for stack in stacks:
        done: list[Handover] = []
        failures: list[str] = []
        async with client() as session:
            for _ in range(rounds):
                asks = [stack.complete(session, prompts.next(LOAD_TOKENS), LOAD_ANSWER) for _ in range(at_once)]
                for result in await asyncio.gather(*asks, return_exceptions=True):
                    if isinstance(result, Handover):
                        done.append(result)
                    else:
                        failures.append(repr(result)[:200])
                if failures:
                    break
        results[stack.name] = _with_gaps(_summary(done, failures), alone_ms)
        say(f"{at_once} at once, {stack.name}: {results[stack.name]}")
    return results


async def poisson(
    stacks: Sequence[Stack],
    rate: float,
    alone_ms: float,
    seconds: float,
    prompts: Callable[[], Prompts],
    seed: int,
    say: Say,
) -> Any:
    """Measures prompts that arrive at random times; the times are the same for each stack."""
    results = {}
    for stack in stacks:
        own, draw = prompts(), random.Random(seed)
        tasks: list[asyncio.Task[Handover]] = []
        async with client() as session:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                prompt = own.next(LOAD_TOKENS)
                tasks.append(asyncio.create_task(stack.complete(session, prompt, LOAD_ANSWER)))
                await asyncio.sleep(draw.expovariate(rate))
            _, pending = await asyncio.wait(tasks, timeout=REQUEST_S)
            for task in pending:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        done = [result for result in ended if isinstance(result, Handover)]
        failures = [repr(result)[:200] for result in ended if not isinstance(result, Handover)]
        results[stack.name] = {"rate": rate, "seconds": seconds, **_with_gaps(_summary(done, failures), alone_ms)}
        say(f"Poisson {rate:.2f}/s, {stack.name}: {results[stack.name]}")
    return results


async def many(ours: Ours, setting: Setting, buffer_bytes: int, count: int, at_once: int, prompts: Prompts) -> Any:
    """Sends more prompts than the small buffers can hold at once, and counts failures and held slots."""
    before = ours.decode.prompt_tokens()
    limit = asyncio.Semaphore(at_once)
    async with client() as session:

        async def one() -> Handover:
            async with limit:
                return await ours.complete(session, prompts.next(LOAD_TOKENS), 2)

        began = time.perf_counter()
        ended = await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)
        seconds = time.perf_counter() - began
    done = [result for result in ended if isinstance(result, Handover)]
    failures = [repr(result)[:200] for result in ended if not isinstance(result, Handover)]
    await asyncio.sleep(1)
    tokens = ours.decode.prompt_tokens() - before
    held = {sidecar.name: sidecar.slots()[1:] for sidecar in (ours.sender, ours.receiver)}
    return {
        "buffer_chunks": buffer_bytes // setting.chunk_bytes,
        "at_once": at_once,
        "seconds": round(seconds, 2),
        **_summary(done, failures),
        "decode_tokens_external": tokens.external,
        "decode_tokens_computed": tokens.computed,
        "slots_held_and_quarantined": held,
    }


async def throughput(stacks: Sequence[Stack], count: int, at_once: int, prompts: Prompts, say: Say) -> Any:
    """Measures prompts per second while the prefill engine always has waiting prompts."""
    results = {}
    for stack in stacks:
        limit = asyncio.Semaphore(at_once)
        async with client() as session:

            async def one(stack: Stack = stack, limit: asyncio.Semaphore = limit, session: Any = session) -> Handover:
                async with limit:
                    return await stack.complete(session, prompts.next(LOAD_TOKENS), 2)

            await asyncio.gather(*(one() for _ in range(at_once)))
            began = time.perf_counter()
            ended = await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)
            seconds = time.perf_counter() - began
        good = sum(isinstance(result, Handover) for result in ended)
        results[stack.name] = {"prompts_per_s": round(good / seconds, 3), "failed": count - good}
        say(f"throughput, {stack.name}: {results[stack.name]}")
    return results


def moved(ours: Ours, setting: Setting, prompts: Sequence[int]) -> dict[str, Any]:
    """Returns the bytes that the sidecars recorded for the last requests, and the bytes that prompts of these lengths
    need.
    """
    count = len(prompts)
    records = {sidecar.name: sidecar.records()[-count:] for sidecar in (ours.sender, ours.receiver)}
    wanted = sum(map(setting.kv.moved, prompts))
    return {
        "bytes_wanted": wanted,
        **{name: sum(record["bytes"] for record in found) for name, found in records.items()},
        "reasons": sorted({str(r["reason"]) for found in records.values() for r in found}),
        "last_records": {name: found[-1] if found else None for name, found in records.items()},
    }


def _summary(done: Sequence[Handover], failures: Sequence[str]) -> dict[str, Any]:
    first = [result.first_s for result in done]
    per_token = [result.per_token_s for result in done if len(result.times) > 1]
    return {
        "done": len(done),
        "failed": len(failures),
        "first_ms_p50": round(quantile(first, 0.5) * 1e3, 1),
        "first_ms_p99": round(quantile(first, 0.99) * 1e3, 1),
        "per_token_ms_p50": round(quantile(per_token, 0.5) * 1e3, 2),
        "per_token_ms_p99": round(quantile(per_token, 0.99) * 1e3, 2),
        "failures": sorted(set(failures))[:3],
    }


def _with_gaps(of: dict[str, Any], alone_ms: float) -> dict[str, Any]:
    """Adds the gap: the time to the first token, minus the same time of one idle instance, in milliseconds."""
    shares = ("p50", "p99") if of["done"] else ()
    gaps = {f"gap_ms_{share}": round(of[f"first_ms_{share}"] - alone_ms, 1) for share in shares}
    return {"alone_ms": alone_ms, **of, **gaps}


def _prefill_s(stack: Stack) -> tuple[float, float]:
    """Returns sum and count of the prefill times that the stack's prefill engine measured itself."""
    metrics = stack.engines[0].metrics()
    name = "vllm:request_prefill_time_seconds"
    return metrics.sum(f"{name}_sum"), metrics.sum(f"{name}_count")


def _mean_ms(before: tuple[float, float], after: tuple[float, float]) -> float:
    count = after[1] - before[1]
    return round((after[0] - before[0]) / count * 1e3, 2) if count else 0.0


def _ms(values: Sequence[float]) -> float:
    return round(median(values) * 1e3, 2) if values else 0.0
