"""Tests KV of models with several groups of layers. Two sidecars run as processes; no engine runs.

A client at each sidecar takes the place of an engine: it fills and reads the slots by the plan of the request.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
from harness.sidecar import CHUNK_TOKENS, NO_PUSH, Sidecar, SidecarOptions
from test_strangers import refusal

from pd_sidecar.client import Client
from pd_sidecar.kv.plan import Part, Plan
from pd_sidecar.sidecar.wire import Ended, Granted, Group, Hello, Layout, Ready, Target

GROUPS = [Group("full", 32), Group("window", 16, 300), Group("state", 30_001)]
PLAIN = Layout("tiny", "bfloat16", 1, 1, 8, False, CHUNK_TOKENS)
LAYOUT = Layout("tiny", "bfloat16", 1, 1, 8, False, CHUNK_TOKENS, quantization="groups:0011223344556677", groups=GROUPS)
SLOTS = 16
BOUND_S = 60.0

pytestmark = pytest.mark.skipif(NO_PUSH, reason="nothing can be pushed")


def content(part: Part) -> bytes:
    """Returns the bytes of a part. Each token of each group, and each byte of a state, has its own value."""
    group = GROUPS[part.group]
    if group.kind == "state":
        return bytes(byte * 7 % 251 for byte in range(part.start, part.start + part.bytes))
    return b"".join(bytes([(part.group * 89 + token) % 251]) * group.bytes for token in range(*part.tokens))


def keys(plan: Plan) -> list[str]:
    tokens = [f"tiny@1@0@{chunk:x}@bfloat16" for chunk in range(plan.token_chunks)]
    return tokens + [f"{tokens[-1]}@state%{index}" for index in range(plan.state_chunks)]


def hello(role: str, layout: Layout) -> Hello:
    return Hello(v=1, engine=f"test-{role}", role=role, rank=0, world_size=1, layout=layout)


@dataclass
class Pair:
    """Two sidecars."""

    sender: Sidecar
    receiver: Sidecar

    @property
    def target(self) -> Target:
        return Target(self.receiver.host, self.receiver.init_port, self.receiver.alloc_port)

    def move(self, req: str, *, tokens: int, have: int, slots: int) -> None:
        """Moves one request, and compares every byte that the decode side needs."""
        plan = Plan(GROUPS, CHUNK_TOKENS, tokens=tokens, have=have)
        prefill = Client.connect(str(self.sender.socket), hello("prefill", LAYOUT), BOUND_S)
        decode = Client.connect(str(self.receiver.socket), hello("decode", LAYOUT), BOUND_S)
        assert prefill.welcome.slot_bytes == decode.welcome.slot_bytes == LAYOUT.chunk_bytes
        assert decode.welcome.slots == slots
        decode.await_(req, keys(plan), tokens=tokens, have_tokens=have, deadline_ms=30_000)
        prefill.reserve(req, self.target, keys(plan), tokens=tokens, upto=tokens, overlap=True)
        ends: list[Ended] = []
        seen: list[int] = []
        deadline = time.monotonic() + BOUND_S
        while len(ends) < 2:
            assert time.monotonic() < deadline, f"only {ends} and {seen}"
            for message in prefill.wait(0.02):
                if isinstance(message, Granted):
                    assert (message.have_tokens, message.layers) == (have, False)
                    for chunk, slot in zip(message.chunks, message.slots, strict=True):
                        for part in plan.parts(chunk):
                            prefill.slot(slot)[part.offset : part.offset + part.bytes] = content(part)
                    if message.chunks:
                        prefill.staged(message.req, message.chunks)
                elif isinstance(message, Ended):
                    ends.append(message)
            for message in decode.wait(0.02):
                if isinstance(message, Ready):
                    assert message.first_token == have
                    for chunk, slot in zip(message.chunks, message.slots, strict=True):
                        for part in plan.parts(chunk):
                            found = bytes(decode.slot(slot)[part.offset : part.offset + part.bytes])
                            assert found == content(part), f"chunk {chunk}, {part}"
                        seen.append(chunk)
                    decode.release(message.req, message.chunks)
                elif isinstance(message, Ended):
                    ends.append(message)
        size = sum(plan.size(chunk) for chunk in range(plan.chunks))
        assert [(end.reason, end.bytes) for end in ends] == [(None, size)] * 2
        assert sorted(seen) == plan.wanted()
        for sidecar in (self.sender, self.receiver):
            record = sidecar.record(req)
            assert (record["reason"], record["chunks"], record["bytes"]) == (None, len(seen), size)
            sidecar.wait_empty()
        prefill.close()
        decode.close()


@pytest.fixture(params=[SLOTS, 2 + 3])
def slots(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def pair(tmp_path: Path, slots: int) -> Iterator[Pair]:
    # On a busy machine the push may reach the receiver before the request that awaits it. The receiver then does not
    # know which tokens the decode side has, and gets all of them. The default wait is 50 ms.
    keys: dict[str, object] = {"checksum": True, "park_ms": 3000}
    receiver = Sidecar(
        SidecarOptions("receiver", slots * LAYOUT.chunk_bytes, transport="tcp", keys=keys), tmp_path, tmp_path
    )
    sender = Sidecar(replace(receiver.options, role="sender"), tmp_path, tmp_path)
    try:
        receiver.start()
        sender.start()
        yield Pair(sender, receiver)
    finally:
        sender.stop()
        receiver.stop()


def test_every_part_arrives_in_its_place(pair: Pair, slots: int) -> None:
    # The state needs three chunks, and a slot has 12 KiB. With five slots, the long prompt goes through a window.
    for index, (tokens, have) in enumerate([(1, 0), (256, 0), (1000, 0), (1000, 300), (1000, 900), (2571, 16)]):
        pair.move(f"r-{index}", tokens=tokens, have=have, slots=slots)


@pytest.mark.parametrize("slots", [SLOTS], indirect=True)
def test_other_groups_are_refused_by_their_name(pair: Pair) -> None:
    other = msgspec.structs.replace(LAYOUT, groups=[GROUPS[0], Group("window", 16, 200), GROUPS[2]])
    refused: list[str] = []
    for layout, text in [(other, "size 300 at position 1"), (PLAIN, "no groups")]:
        prefill = Client.connect(str(pair.sender.socket), hello("prefill", LAYOUT), BOUND_S)
        decode = Client.connect(str(pair.receiver.socket), hello("decode", layout), BOUND_S)
        plan = Plan(GROUPS, CHUNK_TOKENS, tokens=100, have=0)
        req = f"r-{len(refused)}"
        prefill.reserve(req, pair.target, keys(plan), tokens=100, upto=100, overlap=False)
        deadline = time.monotonic() + BOUND_S
        while not (ends := [event for event in prefill.wait(0.1) if isinstance(event, Ended)]):
            assert time.monotonic() < deadline, "the request does not end"
        refused += [end.reason or "" for end in ends]
        assert pair.sender.process is not None
        while text not in pair.sender.process.output():
            assert time.monotonic() < deadline, pair.sender.process.tail()
            time.sleep(0.05)
        prefill.close()
        decode.close()
    assert refused == ["layout_mismatch"] * 2


@pytest.mark.parametrize("slots", [SLOTS], indirect=True)
def test_malformed_groups_are_refused_by_the_name_of_the_field(pair: Pair) -> None:
    for groups, text in [
        ([Group("rows", 16)], "groups[0].kind"),
        ([*GROUPS, Group("window", 16)], "groups[3].size"),
        ([Group("full", 32), Group("state", 10_000_000)], "pd_buffer_size"),
    ]:
        layout = msgspec.structs.replace(LAYOUT, groups=groups)
        assert text in refusal(pair.receiver, hello("decode", layout))
