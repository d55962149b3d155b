"""Kills a sidecar while requests run, and compares the texts with those of one instance."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence

from harness.sidecar import Sidecar

from gpu.measure import Prompts
from gpu.small import VOCABULARY
from gpu.stacks import Handover, Ours, Plain, at_once, client
from gpu.texts import Match, Reference, reference

TOKENS = 12
# The time limit of a request while a sidecar is killed. The limit covers the sidecars' own limits (5 s without a
# sender), and the time to compute the prompt again.
FAULT_S = 60.0


def check_killed(ours: Ours, plain: Plain, victim: str) -> None:
    """Kills the sidecar `victim` while it moves KV. Asserts that each request is answered, that no text is wrong, that
    the decode engine has computed lost KV again, and that transfers work when the sidecar is back.
    """
    prompts = Prompts(4 if victim == "sender" else 5, VOCABULARY)
    asked = [prompts.next(1500 + i) for i in range(16)]
    expected = references(plain, asked, 8)
    theirs = differences(at_once(plain, asked, 8), expected)
    sidecar: Sidecar = getattr(ours, victim)

    async def under_fire() -> list[Handover | BaseException]:
        async with client(FAULT_S) as session:
            tasks = [asyncio.create_task(ours.complete(session, prompt, 8)) for prompt in asked]
            await until_it_holds_slots(sidecar)
            assert sidecar.process is not None
            sidecar.process.signal(signal.SIGKILL)
            return await asyncio.gather(*tasks, return_exceptions=True)

    before = ours.decode.prompt_tokens()
    assert differences(asyncio.run(under_fire()), expected) <= theirs
    assert (ours.decode.prompt_tokens() - before).computed > len(asked), (
        "the sidecar was killed after it had moved all KV"
    )
    sidecar.stop()
    sidecar.start()
    ours.wait()
    prompt = prompts.next(900)
    answers = at_once(ours, [prompt], TOKENS)
    assert differences(answers, references(plain, [prompt], TOKENS)) == 0
    for side in (ours.sender, ours.receiver):
        wait_for_record(side, ours.setting.kv.moved(900))


def references(plain: Plain, prompts: Sequence[list[int]], tokens: int) -> list[Reference]:
    """Returns the expected answers. Sends one request at a time: requests in one batch change each other's rounding."""
    found = [reference(plain.engine.url, prompt, tokens) for prompt in prompts]
    long = [of.text for of, prompt in zip(found, prompts, strict=True) if len(prompt) > 1]
    assert len(set(long)) == len(long), "texts do not depend on their prompts"
    return found


def differences(answers: Sequence[Handover | BaseException], expected: Sequence[Reference]) -> int:
    """Returns the number of wrong texts. Fails if an answer is missing."""
    matches = []
    for answer, of in zip(answers, expected, strict=True):
        assert isinstance(answer, Handover), repr(answer)
        matches.append(of.match(answer.text))
    print({match.value: matches.count(match) for match in Match})
    return matches.count(Match.WRONG)


async def until_it_holds_slots(sidecar: Sidecar) -> None:
    """Returns when the sidecar holds a slot, which means that a push is in flight."""
    async with asyncio.timeout(FAULT_S):
        while (await asyncio.to_thread(sidecar.slots))[1] == 0:
            await asyncio.sleep(0)


def wait_for_record(sidecar: Sidecar, size: int) -> None:
    """Waits for the record of the last request, which comes a moment after the client's answer."""
    deadline = time.monotonic() + 5
    while not (records := sidecar.records()) or (records[-1]["bytes"], records[-1]["reason"]) != (size, None):
        assert time.monotonic() < deadline, records[-1:]
        time.sleep(0.02)
