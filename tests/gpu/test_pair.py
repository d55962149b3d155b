"""Two real engines on GPUs with their sidecars: texts, bytes, faults. On one GPU both sides share it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.engine import wait_for
from harness.process import ended_by_signals
from harness.sidecar import ROOT

from gpu.measure import Prompts
from gpu.model import write_model
from gpu.setting import Setting, gpus
from gpu.stacks import Handover, Ours, Plain, Stack, client

FOUND = gpus()
if not FOUND:
    pytest.skip("NOT TESTED: there is no GPU", allow_module_level=True)

LENGTHS = (1, 15, 255, 256, 257, 700, 2500)
FOLDER = ROOT / "target" / "gpu-test"


@pytest.fixture(scope="module")
def stacks() -> Iterator[tuple[Ours, Plain]]:
    """Prefill in chunks, with blocks of 16 tokens; decode with blocks of 64, and heads before tokens."""
    setting = Setting(
        write_model(Path(FOLDER) / "model", "small"),
        "small",
        FOLDER,
        (0, min(1, len(FOUND) - 1)),
        buffer_bytes=64 * 8 * 2 * 4 * 128 * 2 * 256,
        kv_bytes=2 << 30,
        model_tokens=4096,
        utilization=0.1,
        side_flags=(("--max-num-batched-tokens", "1024"), ("--block-size", "64")),
        side_env=((), (("VLLM_KV_CACHE_LAYOUT", "HND"),)),
        push="layers",
        sidecar_keys={"park_ms": 1000, "checksum": True},
    )
    ours, plain = Ours(setting), Plain(setting)
    with ended_by_signals():
        try:
            for stack in (ours, plain):
                stack.start()
            for stack in (ours, plain):
                wait_for(stack.engines)
                stack.wait()
            yield ours, plain
        finally:
            for part in (*ours.parts, *plain.parts):
                part.stop()
            ours.close()


def run(stack: Stack, prompts: list[list[int]], tokens: int = 12) -> list[Any]:
    """All at once."""

    async def all_of_them() -> list[Any]:
        async with client() as session:
            asks = (stack.complete(session, prompt, tokens) for prompt in prompts)
            return await asyncio.gather(*asks, return_exceptions=True)

    return asyncio.run(all_of_them())


def test_texts_are_those_of_one_instance_and_all_kv_was_moved(stacks: tuple[Ours, Plain]) -> None:
    ours, plain = stacks
    prompts = Prompts(2, 32000)
    before = ours.decode.prompt_tokens()
    for tokens in LENGTHS:
        prompt = prompts.next(tokens)
        (mine,), (theirs,) = run(ours, [prompt]), run(plain, [prompt])
        assert isinstance(mine, Handover), mine
        assert mine.text == theirs.text, tokens
    wanted = sum(LENGTHS) * ours.setting.token_bytes
    for sidecar in (ours.sender, ours.receiver):
        records = sidecar.records()[-len(LENGTHS) :]
        assert [record["reason"] for record in records] == [None] * len(LENGTHS), records
        assert sum(record["bytes"] for record in records) == wanted
        sidecar.wait_empty()
    sources = ours.decode.prompt_tokens() - before
    assert sources.external >= sum(LENGTHS) - len(LENGTHS)
    assert sources.computed <= len(LENGTHS)


def test_many_at_once_all_come_through(stacks: tuple[Ours, Plain]) -> None:
    ours, _ = stacks
    prompts = Prompts(3, 32000)
    results = run(ours, [prompts.next(300 + 37 * i) for i in range(48)])
    assert all(isinstance(result, Handover) for result in results), results
    records = ours.sender.records()[-48:]
    assert {record["reason"] for record in records} == {None}
    for sidecar in (ours.sender, ours.receiver):
        sidecar.wait_empty()


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_a_sidecar_that_is_killed_costs_time_and_nothing_else(stacks: tuple[Ours, Plain], victim: str) -> None:
    ours, plain = stacks
    prompts = Prompts(4, 32000)
    asked = [prompts.next(1500 + i) for i in range(12)]

    async def under_fire() -> list[Any]:
        async with client() as session:
            tasks = [asyncio.create_task(ours.complete(session, prompt, 8)) for prompt in asked]
            await asyncio.sleep(0.05)
            process = getattr(ours, victim).process
            process.signal(signal.SIGKILL)
            return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(under_fire())
    assert all(isinstance(result, Handover) for result in results), results
    sidecar = getattr(ours, victim)
    sidecar.stop()
    sidecar.start()
    ours.wait()
    prompt = prompts.next(900)
    (mine,), (theirs,) = run(ours, [prompt]), run(plain, [prompt])
    assert mine.text == theirs.text
    assert ours.sender.record(ours.sender.records()[-1]["req"])["bytes"] == 900 * ours.setting.token_bytes
