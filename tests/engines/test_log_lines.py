"""Tests the log lines that users of LMCache search for. docs/migrating-from-lmcache.md promises these lines, and real
engines must write them.

The lines have the same form as on the page: words in capitals are whole numbers (`ID` is the id of a request), and `..`
is any other number.
"""

from __future__ import annotations

import re
import time

import pytest
from harness.client import complete
from harness.model import KV_BYTES_PER_TOKEN
from harness.pair import CHUNK_BYTES, Moved, Pair
from harness.process import Part
from harness.prompts import prompt
from harness.reference import Reference
from harness.sidecar import ROOT

PAGE = (ROOT / "docs" / "migrating-from-lmcache.md").read_text()

STORED = (
    "[req_id=ID] Stored N out of total M tokens. size: .. GB, cost .. ms, throughput: .. GB/s; "
    "parts: K chunks, gather .. ms"
)
RETRIEVED = (
    "[req_id=ID] Retrieved N out of R required tokens (from M total tokens). "
    "size: .. gb, cost .. ms, throughput: .. GB/s"
)
PARKED = "Reqid: ID, Total tokens M, Inference Engine computed tokens: C, hit tokens: H, need to load: L"
SENT = "request done: Stored N out of total M tokens, cost .. ms, throughput: .. GB/s, K chunks"
RECEIVED = "request done: Received N out of total M tokens, cost .. ms, throughput: .. GB/s, K chunks"
EARLY = "request ended early"

LENGTH = 700
SHARED = 300
# Both prompts begin with the same `SHARED` tokens, of which `HELD` tokens fill whole blocks of 64 tokens.
HELD = 256


def found(part: Part, line: str, request_id: str, bound_s: float = 30.0) -> dict[str, float]:
    """Returns the numbers in a log line about a request, each under its name.

    The numbers of `..` have the names `size`, `ms`, ...
    """
    names = iter(("size", "ms", "rate", "gather") if "size: .." in line else ("ms", "rate"))
    expression = "".join(
        re.escape(piece) if index % 2 == 0
        else re.escape(request_id) if piece == "ID"
        else rf"(?P<{next(names)}>\d+\.\d+)" if piece == ".."
        else rf"(?P<{piece}>\d+)"
        for index, piece in enumerate(re.split(r"(\.\.|\bID\b|\b[A-Z]\b)", line))
    )  # fmt: skip
    assert part.process is not None
    deadline = time.monotonic() + bound_s
    while True:
        for shown in part.process.output().splitlines():
            if request_id in shown and (match := re.search(expression, shown)):
                return {name: float(value) for name, value in match.groupdict().items()}
        if time.monotonic() > deadline:
            raise part.process.failure(f"no line {line!r} about {request_id}")
        time.sleep(0.05)


@pytest.mark.parametrize("line", [STORED, RETRIEVED, PARKED, SENT, RECEIVED, EARLY])
def test_the_page_has_them(line: str) -> None:
    assert f"`{line}`" in PAGE


def check(pair: Pair, moved: Moved, total: int, held: int) -> None:
    """Asserts that the logs and the records of a request contain the same numbers."""
    req, fresh = moved.request_id, total - held
    chunks = moved.sender["chunks"]
    size = fresh * KV_BYTES_PER_TOKEN / 1e9

    stored = found(pair.prefill, STORED, req)
    assert (stored["N"], stored["M"], stored["K"]) == (fresh, total, chunks)
    assert stored["size"] == pytest.approx(size, abs=1e-4)
    assert stored["rate"] == pytest.approx(size / (stored["ms"] / 1e3), rel=0.05, abs=1e-4)
    assert 0 < stored["gather"] <= stored["ms"]

    parked = found(pair.decode, PARKED, req)
    assert (parked["M"], parked["C"], parked["H"], parked["L"]) == (total, held, total, fresh)

    retrieved = found(pair.decode, RETRIEVED, req)
    assert (retrieved["N"], retrieved["R"], retrieved["M"]) == (fresh, fresh, total)
    assert retrieved["size"] == pytest.approx(size, abs=1e-4)
    assert retrieved["ms"] > 0

    sent = found(pair.sender, SENT, req)
    assert (sent["N"], sent["M"], sent["K"]) == (fresh, total, chunks)
    assert sent["ms"] == pytest.approx(moved.sender["push_us"] / 1e3)
    received = found(pair.receiver, RECEIVED, req)
    assert (received["N"], received["M"], received["K"]) == (fresh, total, chunks)
    assert received["ms"] == pytest.approx(moved.receiver["ready_us"] / 1e3)


def test_a_request_and_one_that_begins_as_it_did(pair: Pair, reference: Reference) -> None:
    first = prompt(SHARED, seed=801)
    moved = pair.move(first)
    moved.check(reference.token_ids(first), SHARED)
    check(pair, moved, SHARED, 0)
    second = first + prompt(LENGTH - SHARED, seed=802)
    moved = pair.move(second)
    moved.check(reference.token_ids(second), LENGTH, cached=HELD)
    check(pair, moved, LENGTH, HELD)


def test_a_request_without_room(pair: Pair, reference: Reference) -> None:
    """Sends only a prefill leg, for a buffer of two slots. The transfer is refused, and a log line reports this."""
    pair.restart_sidecars(landing_bytes=2 * CHUNK_BYTES)
    req = "no-room"
    to = pair.receiver
    spec = {
        "req_id": req, "receiver_host": to.host, "receiver_init_port": [to.init_port],
        "receiver_alloc_port": [to.alloc_port],
    }  # fmt: skip
    params = {"do_remote_decode": True, "disagg_spec": spec}
    complete(pair.prefill.url, prompt(LENGTH, seed=803), max_tokens=1, kv_transfer_params=params)
    record = pair.sender.record(req)
    found(pair.sender, EARLY, req)
    assert pair.sender.process is not None
    (line,) = (shown for shown in pair.sender.process.output().splitlines() if EARLY in shown and req in shown)
    assert record["reason"] == "too_large"
    assert "reason=too_large" in line
    reasons = pair.sender.metrics().by("pd_sidecar_requests", "reason")
    assert reasons["too_large"] == 1
