"""One prefill instance and two decode instances."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine import Engine, wait_for
from harness.pair import Pair
from harness.progress import Progress
from harness.prompts import prompt
from harness.reference import Reference
from harness.sidecar import Sidecar
from harness.traffic import Traffic

BOUND_S = 20.0
SOME = 6


@pytest.fixture
def second(pair: Pair) -> Iterator[tuple[Engine, Sidecar]]:
    # Not below the repository: the path of a unix socket has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="pd-"))
    engine, sidecar = pair.another_decoder(folder)
    try:
        sidecar.start()
        engine.start()
        wait_for([engine], Progress())
        engine.warm_up()
        sidecar.wait_ready()
        wait_for_decoders(pair, 2)
        yield engine, sidecar
    finally:
        for part in (sidecar, engine):
            part.stop()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_decoders(pair: Pair, count: int, bound_s: float = 15.0) -> None:
    deadline = time.monotonic() + bound_s
    while len(ready := [i for i in pair.proxy.instances() if is_decoder(i)]) != count:
        assert time.monotonic() < deadline, ready
        time.sleep(0.05)


def is_decoder(instance: dict[str, object]) -> bool:
    standing = instance["standing"]
    assert isinstance(standing, dict)
    return instance["role"] == "decode" and standing["state"] == "ready"


def test_both_decode_and_one_dies(pair: Pair, reference: Reference, second: tuple[Engine, Sidecar]) -> None:
    used = set()
    for number in range(4):
        tokens = prompt(300 + 256 * number, seed=410 + number)
        answer = pair.complete(tokens)
        assert answer.token_ids == reference.token_ids(tokens)
        record = pair.proxy.record(answer.headers["x-request-id"])
        assert (record["alone"], record["outcome"]) == (None, "done"), record
        used.add(record["decode"])
    assert len(used) == 2, used
    engine, _ = second
    assert engine.prompt_tokens().external > 0, "the second one computed what was pushed to it"

    with Traffic(pair, clients=3, seed=42, bound_s=BOUND_S) as traffic:
        traffic.wait_for(SOME)
        killed = time.monotonic()
        engine.kill()
        traffic.wait_for(2 * SOME)
        wait_for_decoders(pair, 1)
        gone = time.monotonic()
        traffic.wait_for(SOME)
    for result in traffic.results:
        if result.answer is not None:
            assert result.answer.token_ids == reference.token_ids(result.prompt, max_tokens=16)
        else:
            # Only a stream that had begun may break.
            assert result.began < gone and result.began + result.seconds > killed, result.error
    broken = [result for result in traffic.results if result.error]
    assert len(broken) <= 3, "requests that had not begun were not taken over"
