"""Compares the messages with the bytes that the Rust side reads and writes."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest

from pd_sidecar.sidecar import wire

FIXTURES = Path(__file__).parents[2] / "protocol" / "fixtures"
ENDS = {
    "ToEngine": (wire.ToEngine, wire.decode_to_engine),
    "ToSidecar": (wire.ToSidecar, wire.decode_to_sidecar),
}


def fixtures():
    """Yields the name, the bytes and the receiving side of each local message."""
    for entry in json.loads((FIXTURES / "messages.json").read_text()):
        if entry["set"] in ENDS:
            body = (FIXTURES / f"{entry['name']}.bin").read_bytes()
            yield entry["name"], body, entry["set"]


ALL = [pytest.param(body, end, id=name) for name, body, end in fixtures()]


@pytest.mark.parametrize(("body", "end"), ALL)
def test_a_message_comes_back_byte_for_byte(body, end):
    message = ENDS[end][1](body)
    frame = wire.encode(message)
    assert frame == wire.HEADER.pack(len(body)) + body


@pytest.mark.parametrize("end", ENDS)
def test_every_message_has_a_fixture(end):
    union, decode = ENDS[end]
    seen = {type(decode(body)) for _, body, of in fixtures() if of == end}
    assert seen == set(typing.get_args(union))


@pytest.mark.parametrize(("body", "end"), ALL)
def test_a_message_that_is_cut_or_of_the_other_end_is_refused(body, end):
    (other,) = set(ENDS) - {end}
    with pytest.raises(wire.WireError):
        ENDS[end][1](body[:-1])
    with pytest.raises(wire.WireError):
        ENDS[other][1](body)
