"""Tests two real engines on GPUs with their sidecars: texts, bytes, load, faults. With one GPU, both sides share it.

`PD_GPU_TESTS_ON_CPU=1` runs the tests with engines on the CPU and a tiny model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest
from harness.sidecar import ROOT

from gpu.kills import check_killed, differences, references
from gpu.measure import Prompts
from gpu.setting import ON_CPU, WIRES, gpus
from gpu.small import VOCABULARY, serving, small
from gpu.stacks import Ours, Plain, at_once

FOUND = gpus()
if not FOUND and not ON_CPU:
    pytest.skip("NOT TESTED: there is no GPU", allow_module_level=True)

LENGTHS = (1, 15, 255, 256, 257, 700, 1900 if ON_CPU else 2500)
TOKENS = 12
CHUNKS = 64
FOLDER = ROOT / "target" / "gpu-test"


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[Ours, Plain]]:
    """Starts both stacks. Only the decode engine's pages have heads before tokens (HND)."""
    # The sender sends layer by layer, although the transport is too fast to gain time from it.
    keys = {"park_ms": 3000 if ON_CPU else 1000, "checksum": True, "layers_below_gb_s": 100_000}
    layout = () if ON_CPU else (("VLLM_KV_CACHE_LAYOUT", "HND"),)
    setting = small(
        FOLDER, (0, min(1, len(FOUND) - 1)), CHUNKS, kv_bytes=2 << 30, side_env=((), layout), sidecar_keys=keys
    )
    ours, plain = Ours(setting), Plain(setting)
    with serving(ours, plain):
        yield ours, plain


@pytest.fixture
def stacks(started: tuple[Ours, Plain]) -> Iterator[tuple[Ours, Plain]]:
    """Checks after each test that no engine and no sidecar holds anything, and that both engines run."""
    yield started
    ours, _ = started
    deadline = time.monotonic() + 15
    for engine in ours.engines:
        assert engine.process is not None
        assert engine.process.alive
        while (held := (engine.requests(), engine.cache_usage())) != (0, 0.0):
            assert time.monotonic() < deadline, f"{engine.options.name}: {held}"
            time.sleep(0.05)
    for sidecar in (ours.sender, ours.receiver):
        sidecar.wait_empty(30)


def check_one_by_one(ours: Ours, plain: Plain, lengths: Sequence[int]) -> set[str]:
    """Asserts that texts equal those of one instance and that all KV was moved. Returns the transports used."""
    prompts = [Prompts(length, VOCABULARY).next(length) for length in lengths]
    expected = references(plain, prompts, TOKENS)
    before = ours.decode.prompt_tokens()
    answers = [answer for prompt in prompts for answer in at_once(ours, [prompt], TOKENS)]
    assert differences(answers, expected) == 0
    transports = set()
    for sidecar in (ours.sender, ours.receiver):
        sidecar.wait_empty()
        records = sidecar.records()[-len(lengths) :]
        assert [record["reason"] for record in records] == [None] * len(lengths), records
        assert [record["bytes"] for record in records] == [n * ours.setting.token_bytes for n in lengths]
        transports |= {record["transport"] for record in records}
    sources = ours.decode.prompt_tokens() - before
    assert sources.external >= sum(lengths) - len(lengths)
    assert sources.computed <= len(lengths)
    return transports


def test_texts_are_those_of_one_instance_and_all_kv_was_moved(stacks: tuple[Ours, Plain]) -> None:
    check_one_by_one(*stacks, LENGTHS)


@pytest.mark.parametrize("wire", WIRES)
def test_texts_over_the_wires_that_auto_does_not_take(stacks: tuple[Ours, Plain], wire: str) -> None:
    ours, plain = stacks
    transport, ucx = WIRES[wire]
    ours.restart_sidecars(ours.setting.buffer_bytes, transport, ucx)
    try:
        assert check_one_by_one(ours, plain, (258, 701, 1901)) == {transport}
    finally:
        ours.restart_sidecars(ours.setting.buffer_bytes)


@pytest.mark.parametrize("count", [16, 48])
def test_many_at_once_say_what_one_instance_says_under_the_same_load(stacks: tuple[Ours, Plain], count: int) -> None:
    """Sends many requests at once. The receivers also compare each chunk's checksum with the sender's checksum."""
    ours, plain = stacks
    draw = Prompts(count, VOCABULARY)
    prompts = [draw.next(300 + 1500 // count * i) for i in range(count)]
    expected = references(plain, prompts, TOKENS)
    theirs = differences(at_once(plain, prompts, TOKENS), expected)
    before = ours.decode.prompt_tokens()
    assert differences(at_once(ours, prompts, TOKENS), expected) <= theirs
    for sidecar in (ours.sender, ours.receiver):
        sidecar.wait_empty()
        records = sidecar.records()[-count:]
        assert {record["reason"] for record in records} == {None}
        assert sum(record["bytes"] for record in records) == sum(map(len, prompts)) * ours.setting.token_bytes
    assert (ours.decode.prompt_tokens() - before).computed <= count
    if not ON_CPU:
        assert ours.prefill.metrics().sum("vllm:pd_sidecar_layered_tokens_total") > 0, "no step was gathered by layers"


@pytest.mark.parametrize("victim", ["sender", "receiver"])
def test_a_sidecar_that_is_killed_costs_time_and_nothing_else(stacks: tuple[Ours, Plain], victim: str) -> None:
    check_killed(*stacks, victim)
