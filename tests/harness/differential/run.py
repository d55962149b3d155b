"""Sends cases to a plain engine and to the proxy, and checks the hand-overs of the proxy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from harness.differential.case import Case
from harness.differential.compare import Difference, content, differences
from harness.differential.send import Got, send
from harness.proxy import Proxy

AT_ONCE = 8

# The proxy keeps the records of its last 256 requests.
BATCH = 200

RECORD_BOUND_S = 30.0
READY_BOUND_S = 60.0

# A failure shows so many cases.
SHOWN = 2 * AT_ONCE


@dataclass(frozen=True)
class Outcome:
    """Both answers to a case, and the proxy's record of the request if KV may have moved."""

    case: Case
    plain: Got
    ours: Got
    record: dict[str, Any] | None

    def differences(self) -> list[Difference]:
        return differences(self.plain, self.ours)

    def sequences(self) -> int:
        """Returns the number of sequences that the answer contains, each of which computes the last token of its
        prompt.
        """
        answer = content(self.plain)
        if not isinstance(answer, dict):
            return 0
        return len(answer.get("choices") or [key for key in answer if key.startswith("choice ")] or [answer])

    def wrong_way(self) -> str | None:
        """Returns a text if the KV of a successful request did not move, or moved although it could not."""
        record = self.record
        if record is None or self.case.alone == "any":
            return None
        # vLLM refuses some streams with the status 200 and an error as the first event. Which of the two engines has
        # refused the request first does not matter.
        if self.plain.body.lstrip().startswith(b'data: {"error"'):
            return None
        moved = (record["moved"] or {}).get("bytes", 0)
        if record["alone"] != self.case.alone or (moved > 0) != (self.case.alone is None):
            return f"{self.case.name}: alone {record['alone']}, {moved} bytes moved; expected alone {self.case.alone}"
        return None


def ask_both(cases: Sequence[Case], plain: str, proxy: Proxy, *, at_once: int = AT_ONCE) -> list[Outcome]:
    """Sends each case to the plain engine and then to the proxy; several cases at once."""
    outcomes: list[Outcome] = []

    def ask(case: Case) -> tuple[Case, Got, Got]:
        theirs, mine = send(plain, case), send(proxy.url, case)
        if mine.status == 503 and b'"no_decode_instance' in mine.body:
            # A sidecar that got no time on a busy machine has lost its registration for a moment.
            proxy.wait_ready(READY_BOUND_S)
            mine = send(proxy.url, case)
        return case, theirs, mine

    with ThreadPoolExecutor(at_once) as threads:
        for at in range(0, len(cases), BATCH):
            got = list(threads.map(ask, cases[at : at + BATCH]))
            # An engine that has ended would differ in all cases that follow.
            lost = [f"{case.name}: {theirs.body!r}" for case, theirs, _ in got if theirs.status == 0]
            assert not lost, "\n".join(["no answer of the plain engine to these, in order:", *lost[:SHOWN]])
            wanted = {
                case.name: ours.headers["x-request-id"] for case, _, ours in got if case.is_split and ours.status == 200
            }
            records = _records(proxy, set(wanted.values()))
            outcomes += [
                Outcome(case, theirs, mine, records.get(wanted.get(case.name, ""))) for case, theirs, mine in got
            ]
    return outcomes


def _records(proxy: Proxy, ids: set[str]) -> dict[str, dict[str, Any]]:
    """Returns the proxy's records of these requests. The sender reports the bytes a moment after the answer."""
    deadline = time.monotonic() + RECORD_BOUND_S
    while True:
        records = {record["id"]: record for record in proxy.records() if record["id"] in ids}
        complete = all(record["alone"] or record["moved"] for record in records.values())
        if len(records) == len(ids) and complete:
            return records
        assert time.monotonic() < deadline, f"records are missing: {len(records)} of {len(ids)}, complete {complete}"
        time.sleep(0.05)
