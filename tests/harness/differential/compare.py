"""Compares two answers, except for ids and times."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness.differential.send import Got
from harness.differential.stream import events_of, folded

# Fields whose values are new in each answer.
IDS = {"id", "item_id", "request_id", "response_id"}
TIMES = {"created", "created_at", "completed_at"}
# Random ids. The parts that the client has chosen stay.
RANDOM = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{16,}")

# Two engines compute in different batches, so their sums have different rounding errors.
TOLERANCE = 2e-3

# Headers of one connection and of one moment.
CONNECTION = {"date", "server", "connection", "content-length", "transfer-encoding", "keep-alive"}


@dataclass(frozen=True)
class Difference:
    """A place where the answers differ: `status`, `header NAME`, or a path into the body."""

    where: str
    plain: Any
    ours: Any

    def __str__(self) -> str:
        return f"{self.where}: plain {_cut(self.plain)}, ours {_cut(self.ours)}"


def differences(plain: Got, ours: Got) -> list[Difference]:
    """Returns all differences between the plain engine's answer and the proxy's answer."""
    found = []
    if plain.status != ours.status:
        found.append(Difference("status", plain.status, ours.status))
    for name in sorted((plain.headers.keys() | ours.headers.keys()) - CONNECTION):
        mine, theirs = ours.headers.get(name), plain.headers.get(name)
        if name == "location":
            mine, theirs = (re.sub(r"^https?://[^/]+", "", value or "") for value in (mine, theirs))
        if mine != theirs:
            found.append(Difference(f"header {name}", theirs, mine))
    return found + list(_differ("body", content(plain), content(ours)))


def content(got: Got) -> Any:
    """Returns a body as JSON without ids and times, the events of a stream in their folded form, or text."""
    kind = got.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        return same(folded(events_of(got.body)))
    try:
        return same(json.loads(got.body))
    except ValueError:
        return got.body.decode(errors="replace")


def same(value: Any, name: str = "") -> Any:
    """Returns a value whose random ids and times are replaced by fixed words."""
    if isinstance(value, dict):
        return {key: same(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [same(inner, name) for inner in value]
    if name in TIMES and isinstance(value, int | float):
        return "TIME"
    return RANDOM.sub("ID", value) if isinstance(value, str) else value


def _differ(where: str, plain: Any, ours: Any) -> Iterator[Difference]:
    if isinstance(plain, dict) and isinstance(ours, dict):
        for name in [*plain, *(name for name in ours if name not in plain)]:
            if name in plain and name in ours:
                yield from _differ(f"{where}.{name}", plain[name], ours[name])
            else:
                yield Difference(f"{where}.{name}", plain.get(name, "absent"), ours.get(name, "absent"))
    elif isinstance(plain, list) and isinstance(ours, list) and len(plain) == len(ours):
        for at, (theirs, mine) in enumerate(zip(plain, ours, strict=True)):
            yield from _differ(f"{where}[{at}]", theirs, mine)
    elif not _equal(plain, ours):
        yield Difference(where, plain, ours)


def _equal(plain: Any, ours: Any) -> bool:
    if isinstance(plain, float) and isinstance(ours, float):
        return math.isclose(plain, ours, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return type(plain) is type(ours) and bool(plain == ours)


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:297]}..."
