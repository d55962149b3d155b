"""One request of the differential suite, and the functions that make many requests from a table."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Paths whose requests are split over the pair.
SPLIT = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/invocations")

JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Case:
    """One request, which is sent to the plain engine and to the proxy."""

    # Names the case in reports and in the list of allowed differences. Unique.
    name: str
    path: str
    body: bytes | None = None
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)
    # The reason for which the decode instance must compute the prompt alone. None if the KV must be moved. "any" if
    # the case does not check it.
    alone: str | None = None
    # True if no other request may run at the same time.
    single: bool = False
    # False for cases that only the long suite sends.
    quick: bool = True

    @property
    def is_split(self) -> bool:
        """True if a successful answer needs a hand-over of KV, unless `alone` names a reason."""
        return self.method == "POST" and self.path.partition("?")[0] in SPLIT


@dataclass(frozen=True)
class Row:
    """A row of a table of cases: fields that are added to a base request. The value `ABSENT` removes a field."""

    fields: Mapping[str, Any]
    alone: str | None = None
    single: bool = False


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def row(*, alone: str | None = None, single: bool = False, **fields: Any) -> Row:
    """Returns a row. `alone` is the reason for which no KV moves. `single` keeps other requests away."""
    return Row(fields, alone, single)


def table(
    title: str, path: str, base: Mapping[str, Any], rows: Iterable[Row], *, streams: tuple[bool, ...] = (False, True)
) -> Iterator[Case]:
    """Yields the cases of a table: each row without a stream and, if `streams` has True, as a stream.

    The short suite sends every second row as a stream, and every row with `stream_options`.
    """
    for (at, one), stream in itertools.product(enumerate(rows), streams):
        fields = {**base, **one.fields, **({"stream": True} if stream else {})}
        body = {name: value for name, value in fields.items() if value is not ABSENT}
        label = ", ".join(f"{name}={_short(value)}" for name, value in one.fields.items()) or "plain"
        name = f"{title}: {label}{' (stream)' if stream else ''}"
        quick = not stream or at % 2 == 0 or "stream_options" in one.fields
        yield Case(name, path, json.dumps(body).encode(), alone=one.alone, single=one.single, quick=quick)


def wrong(
    title: str, path: str, base: Mapping[str, Any], names: Iterable[str], values: Iterable[Any]
) -> Iterator[Case]:
    """Yields one case for each field and each value, most of which the engine refuses."""
    for name, value in itertools.product(names, values):
        body = {**base, name: value}
        yield Case(f"{title}: wrong {name}={_short(value)}", path, json.dumps(body).encode(), alone="any")


def post(name: str, path: str, body: Any, *, alone: str | None = None, **headers: str) -> Case:
    """Returns a case with a JSON body. `headers` are added; underscores stand for hyphens."""
    more = {key.replace("_", "-"): value for key, value in headers.items()}
    return Case(name, path, json.dumps(body).encode(), headers={**JSON, **more}, alone=alone)


def bare(method: str, path: str, body: bytes | None = None, *, name: str = "", **headers: str) -> Case:
    """Returns a case without a content type, unless `headers` names one."""
    more = {key.replace("_", "-"): value for key, value in headers.items()}
    return Case(name or f"{method} {path}", path, body, method=method, headers=more, alone="any")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value) if value is ABSENT else json.dumps(value)
    text = text.encode("unicode_escape").decode()
    # A digest tells long values apart that begin alike.
    return text if len(text) <= 40 else f"{text[:37]}... {hashlib.sha256(text.encode()).hexdigest()[:4]}"
