"""Tests the workers' half with real tensors, a real socket and a sidecar's messages."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from fake_sidecar import PATIENCE_S, FakeSidecar

from pd_sidecar.kv.layout import Hint, chunk_span, geometry
from pd_sidecar.kv.parts import Parts
from pd_sidecar.options.config import Options
from pd_sidecar.scheduler.metadata import IdleReport, LoadStart, PushStart, PushStep, StepMetadata
from pd_sidecar.scheduler.stats import Stats
from pd_sidecar.sidecar import wire
from pd_sidecar.worker.ranks import Part, Share
from pd_sidecar.worker.worker import Worker

LAYERS, HEADS, SIZE, BLOCK, BLOCKS, CHUNK = 4, 2, 8, 16, 32, 32
TOKENS, HASHES = 80, ["a", "b", "c"]
WIDTH = HEADS * SIZE


class Rig:
    def __init__(self, tmp_path, **more):
        torch.manual_seed(3)
        names = [f"layers.{i}" for i in range(LAYERS)]
        self.tensors = {name: torch.randn(BLOCKS, HEADS, BLOCK, 2 * SIZE) for name in names}
        self.stats = Stats()
        self.invalid_blocks = set()
        self.paths = {end: tmp_path / f"{end}.sock" for end in ("sender", "receiver")}
        self.sender = FakeSidecar(self.paths["sender"])
        self.receiver = FakeSidecar(self.paths["receiver"])
        options = Options(
            sender_socket=str(self.paths["sender"]),
            receiver_socket=str(self.paths["receiver"]),
            model_name="m",
            chunk_size=CHUNK,
            **more,
        )
        self.worker = Worker(
            self.parts(geometry(self.tensors, Hint(BLOCKS, BLOCK, HEADS, SIZE, False))),
            options,
            self.stats,
            engine="test",
            share=Share(1, (Part(0),)),
            producer=True,
            consumer=True,
        )
        self.wait_connected()

    def parts(self, pages):
        return Parts.one(pages)

    def wait_connected(self):
        self.until(lambda: all(link.client.connected for link in self.worker._links))

    def step(self, *, forward=True, layers=(), **more):
        """Runs one step of the engine, with or without tokens."""
        metadata = StepMetadata(idle=not forward, **more)
        self.worker.begin(metadata)
        for name in layers:
            self.worker.layer_computed(name)
        if forward:
            self.worker.computed()
        return self.worker.finish()

    def until(self, condition, seconds=PATIENCE_S):
        """Runs steps without tokens until the condition holds. Returns all requests that these steps reported."""
        sent, received, failed, deadline = [], [], [], time.monotonic() + seconds
        while True:
            # Test the condition before the step: the thread may make it true, and only a later step reports the result.
            holds = condition()
            out, results = self.step(forward=False)
            sent += out
            received += results.received
            failed += results.failed
            self.invalid_blocks |= results.invalid_blocks
            if holds:
                return sent, received, failed
            assert time.monotonic() < deadline
            # Without this pause, the loop would leave the other threads hardly any time to run.
            time.sleep(0.0005)

    def kv(self, table, start, stop):
        """Returns the KV of these positions as `[2, layers, tokens, width]`."""
        out = []
        for position in range(start, stop):
            block, offset = table[position // BLOCK], position % BLOCK
            rows = [t[block, :, offset].view(HEADS, 2, SIZE) for t in self.tensors.values()]
            out.append(torch.stack(rows).permute(2, 0, 1, 3).reshape(2, LAYERS, WIDTH))
        return torch.stack(out, 2)

    def chunk(self, slot, tokens):
        data = self.sender.read(slot, 2 * LAYERS * tokens * WIDTH * 4)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(2, LAYERS, tokens, WIDTH)


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.worker.close()


def push(**more):
    return PushStart("a", "r", "h", (7300,), (7400,), HASHES, TOKENS, True, **more)


def load(have=0, name="a", req="r", blocks=(3, 9, 27, 1, 5)):
    return LoadStart(name, req, HASHES, TOKENS, have, TOKENS, (list(blocks),), list(blocks)[have // BLOCK :])


TABLE = [8, 2, 30, 11, 4]
KEYS = [f"m@1@0@{h}@float" for h in HASHES]


# Prefill.


def test_tags_stand_in_the_keys_of_both_sides(rig):
    tags = ["@salt%1", "@salt%1", "@salt%1@mm%2"]
    tagged = [key + tag for key, tag in zip(KEYS, tags, strict=True)]
    rig.step(push_starts=[push(tags=tags)], push_steps=[PushStep("a", (TABLE,), True, TOKENS)])
    assert rig.sender.next(wire.Reserve).keys == tagged
    rig.step(load_starts=[dataclasses.replace(load(name="b", req="s"), tags=tags)])
    assert rig.receiver.next(wire.Await).keys == tagged


def test_chunks_are_staged_when_they_have_slots_and_tokens(rig):
    rig.step(push_starts=[push()], push_steps=[PushStep("a", (TABLE[:3],), True, 40)])
    assert rig.sender.next() == wire.Reserve("r", wire.Target("h", 7300, 7400), KEYS, TOKENS, 40, True)
    rig.sender.say(wire.Granted("r", 0, [0, 1], [5, 3]))
    rig.until(lambda: not rig.sender.nothing())
    staged = rig.sender.next(wire.Staged)
    assert (staged.req, staged.chunks) == ("r", [0])
    assert torch.equal(rig.chunk(5, CHUNK), rig.kv(TABLE, 0, 32))
    # The worker announces a chunk only after the forward that completes it.
    rig.worker.begin(StepMetadata(push_steps=[PushStep("a", (TABLE[3:],), False, TOKENS)]))
    assert rig.sender.next() == wire.Computing("r", TOKENS)
    rig.worker.move()
    assert rig.sender.nothing()
    rig.worker.computed()
    assert rig.worker.finish()[0] == set()
    assert rig.sender.next(wire.Staged).chunks == [1]
    rig.step(forward=False, finished=["a"])
    rig.sender.say(wire.Granted("r", 0, [2], [0]))
    sent, _, _ = rig.until(lambda: not rig.sender.nothing())
    assert rig.sender.next(wire.Staged).chunks == [2]
    sent += rig.step(forward=False)[0]
    assert sent == ["a"]
    assert torch.equal(rig.chunk(0, 16), rig.kv(TABLE, 64, 80))
    assert rig.stats.data["save_tokens"] == TOKENS
    assert rig.stats.data["save_bytes"] == TOKENS * 2 * LAYERS * WIDTH * 4


def begin_push(rig, upto=TOKENS):
    rig.step(push_starts=[push()], push_steps=[PushStep("a", (TABLE,), True, upto)])
    rig.sender.next(wire.Reserve)


def test_what_the_other_side_has_is_not_gathered(rig):
    begin_push(rig)
    rig.step(forward=False, finished=["a"])
    rig.sender.say(wire.Granted("r", 48, [], []))
    rig.until(lambda: rig.worker._senders[0]._by_req["r"].have_tokens is not None)
    rig.sender.say(wire.Granted("r", 48, [1, 2], [6, 7]))
    sent, _, _ = rig.until(lambda: not rig.worker._senders[0]._by_req)
    assert sent == ["a"]
    assert sorted(rig.sender.next(wire.Staged).chunks) == [1, 2]
    assert torch.equal(rig.chunk(6, 16), rig.kv(TABLE, 48, 64))
    assert torch.equal(rig.chunk(7, 16), rig.kv(TABLE, 64, 80))


def test_nothing_wanted_frees_the_blocks(rig):
    begin_push(rig)
    assert rig.step(forward=False, finished=["a"])[0] == set()
    rig.sender.say(wire.Granted("r", TOKENS, [], []))
    assert rig.until(lambda: not rig.worker._senders[0]._by_req)[0] == ["a"]
    assert rig.sender.nothing()


@pytest.mark.parametrize("reason", ["no_room", None])
def test_a_push_that_the_sidecar_ends_frees_the_blocks_once(rig, reason):
    begin_push(rig)
    rig.sender.say(wire.Ended("r", reason, 0))
    rig.until(lambda: rig.worker._senders[0]._by_req["r"].over)
    # The worker reports the request only after the engine has finished it. The engine does not expect an earlier
    # report.
    assert rig.step(forward=False)[0] == set()
    assert rig.step(forward=False, finished=["a"])[0] == {"a"}
    assert rig.step(forward=False)[0] == set()
    assert rig.stats.data.get("save_failures", {}) == ({reason: 1} if reason else {})
    assert rig.sender.nothing()


def test_an_aborted_push_is_cancelled(rig):
    begin_push(rig, upto=16)
    assert rig.step(forward=False, cancelled=["a"])[0] == set()
    assert rig.sender.next() == wire.Cancel("r")
    rig.sender.say(wire.Granted("r", 0, [0], [1]))
    time.sleep(0.05)
    rig.step(forward=False)
    assert rig.sender.nothing()
    assert not rig.worker._senders[0]._by_engine_id


def test_a_preempted_push_gathers_from_its_new_table_and_keeps_what_is_staged(rig):
    begin_push(rig, upto=64)
    rig.sender.say(wire.Granted("r", 0, [0], [1]))
    rig.until(lambda: not rig.sender.nothing())
    assert rig.sender.next(wire.Staged).chunks == [0]
    rig.step(preempted=["a"])
    rig.sender.say(wire.Granted("r", 0, [1, 2], [2, 3]))
    rig.until(lambda: rig.worker._senders[0]._by_req["r"].slots)
    assert rig.sender.nothing()  # the request's old blocks belong to other requests
    again = [20, 21, 22, 23, 24]
    rig.step(push_steps=[PushStep("a", (again,), True, 48)])
    assert rig.sender.nothing()  # computed again up to token 48, but chunk 1 ends at 64
    rig.step(push_steps=[PushStep("a", ([],), False, TOKENS)])
    assert rig.sender.next() == wire.Computing("r", TOKENS)
    assert rig.sender.next(wire.Staged).chunks == [1, 2]
    assert torch.equal(rig.chunk(2, 32), rig.kv(again, 32, 64))
    assert torch.equal(rig.chunk(3, 16), rig.kv(again, 64, 80))


def test_blocks_are_not_held_for_ever(tmp_path):
    rig = Rig(tmp_path, save_deadline_ms=500)
    begin_push(rig)
    rig.step(forward=False, finished=["a"])
    sent, _, _ = rig.until(lambda: not rig.worker._senders[0]._by_req)
    assert sent == ["a"]
    assert rig.sender.next() == wire.Cancel("r")
    assert rig.stats.data["save_failures"] == {"save_deadline": 1}
    rig.worker.close()


def test_without_a_sidecar_a_push_ends_at_once(rig):
    rig.sender.stop()
    rig.until(lambda: not rig.worker._links[0].client.connected)
    rig.step(push_starts=[push()], push_steps=[PushStep("a", (TABLE,), True, TOKENS)])
    assert rig.step(forward=False, finished=["a"])[0] == {"a"}
    assert rig.stats.data["save_failures"] == {"no_sidecar": 1}


def test_a_push_does_not_survive_its_sidecar_but_the_next_one_works(rig):
    begin_push(rig)
    rig.sender.stop()
    rig.until(lambda: not rig.worker._links[0].client.connected)
    assert rig.step(forward=False, finished=["a"])[0] == {"a"}
    assert rig.stats.data["save_failures"] == {"sidecar_lost": 1}
    rig.sender = FakeSidecar(rig.paths["sender"], epoch=2)
    rig.wait_connected()
    begin_push(rig)
    rig.sender.say(wire.Granted("r", 64, [2], [4]))
    rig.until(lambda: not rig.sender.nothing())
    assert rig.sender.next(wire.Staged).chunks == [2]
    assert torch.equal(rig.chunk(4, 16), rig.kv(TABLE, 64, 80))


# Decode.


def land(rig, have=0, first_token=None):
    """Puts random chunks into slots of the receiver, and returns the `Ready` for them."""
    first_token = have if first_token is None else first_token
    chunks = [c for c in range(len(HASHES)) if chunk_span(c, TOKENS, have, CHUNK)[1] > have]
    landed = {}
    for chunk in chunks:
        start, stop = chunk_span(chunk, TOKENS, first_token, CHUNK)
        landed[chunk] = torch.randn(2, LAYERS, stop - start, WIDTH)
        rig.receiver.write(7 - chunk, landed[chunk].numpy().tobytes())
    return landed, wire.Ready("r", first_token, chunks, [7 - c for c in chunks])


def test_a_load_is_scattered_released_and_reported_once(rig):
    start = load()
    rig.step(forward=False, load_starts=[start])
    assert rig.receiver.next() == wire.Await("r", KEYS, TOKENS, 0, 30_000)
    landed, ready = land(rig)
    rig.receiver.say(wire.Ready("r", 0, [0], [7]), wire.Ready("r", 0, [1, 2], [6, 5]))
    assert ready.slots == [7, 6, 5]
    sent, received, failed = rig.until(lambda: not rig.worker._receivers[0]._by_req)
    assert (sent, received, failed) == ([], ["a"], [])
    assert torch.equal(rig.kv(start.tables[0], 0, TOKENS), torch.cat(list(landed.values()), 2))
    released = []
    while len(released) < 3:
        released += rig.receiver.next(wire.Release).chunks
    assert sorted(released) == [0, 1, 2]
    assert rig.receiver.nothing()
    rig.receiver.say(wire.Ended("r", None, 1))
    time.sleep(0.05)
    assert rig.step(forward=False)[1].received == set()
    assert (rig.stats.data["loads"], rig.stats.data["load_tokens"]) == (1, TOKENS)


@pytest.mark.parametrize("first_token", [48, 32, 0])
def test_the_local_prefix_is_never_written(rig, first_token):
    start = load(have=48)
    before = {name: tensor.clone() for name, tensor in rig.tensors.items()}
    rig.step(forward=False, load_starts=[start])
    assert rig.receiver.next(wire.Await).have_tokens == 48
    landed, ready = land(rig, 48, first_token)
    rig.receiver.say(ready)
    _, received, failed = rig.until(lambda: not rig.worker._receivers[0]._by_req)
    assert (received, failed) == (["a"], [])
    for name, tensor in rig.tensors.items():
        for block in range(BLOCKS):
            same = torch.equal(tensor[block], before[name][block])
            assert same == (block not in start.tables[0][3:]), block
    assert torch.equal(rig.kv(start.tables[0], 64, 80), landed[2])
    assert torch.equal(rig.kv(start.tables[0], 48, 64), landed[1][:, :, 48 - max(32, first_token) :])


def test_a_chunk_that_begins_too_late_is_not_used(rig):
    rig.step(forward=False, load_starts=[load(have=32)])
    rig.receiver.next(wire.Await)
    before = {name: tensor.clone() for name, tensor in rig.tensors.items()}
    _, ready = land(rig, 32, 48)
    rig.receiver.say(ready)
    _, received, failed = rig.until(lambda: not rig.worker._receivers[0]._by_req)
    assert (received, failed) == (["a"], ["a"])
    assert all(torch.equal(rig.tensors[name], before[name]) for name in before)
    assert rig.receiver.next() == wire.Abort("r")


def test_a_load_that_ends_early_is_reported_as_failed(rig):
    rig.step(forward=False, load_starts=[load(have=32)])
    rig.receiver.next(wire.Await)
    rig.receiver.say(wire.Ended("r", "no_sender", 0))
    _, received, failed = rig.until(lambda: not rig.worker._receivers[0]._by_req)
    assert (received, failed) == (["a"], ["a"])
    assert rig.invalid_blocks == {27, 1, 5}  # the prefix's block is not invalid: other requests share it
    assert rig.receiver.next() == wire.Abort("r")  # the abort releases the chunks that the sidecar had announced
    assert rig.stats.data["load_failures"] == {"no_sender": 1}


def test_an_aborted_load_is_reported_too(rig):
    rig.step(forward=False, load_starts=[load()])
    rig.receiver.next(wire.Await)
    _, results = rig.step(forward=False, aborted=["a"])
    assert results.received == {"a"}
    assert rig.receiver.next() == wire.Abort("r")
    assert rig.step(forward=False, aborted=["a"])[1].received == set()
    # The sidecar announced these chunks before it read the abort. The worker releases them without reading them.
    _, ready = land(rig)
    rig.receiver.say(ready)
    rig.until(lambda: not rig.receiver.nothing())
    assert rig.receiver.next(wire.Release).chunks == [0, 1, 2]


def test_a_dismissed_request_is_aborted_at_the_sidecar(rig):
    rig.step(dismissed=["other"])
    assert rig.receiver.next() == wire.Abort("other")


def test_without_a_sidecar_a_load_fails_at_once(rig):
    rig.receiver.stop()
    rig.until(lambda: not rig.worker._links[1].client.connected)
    _, results = rig.step(forward=False, load_starts=[load()])
    assert (results.received, set(results.failed)) == ({"a"}, {"a"})
    assert rig.stats.data["load_failures"] == {"no_sidecar": 1}


def test_loads_fail_with_their_sidecar_and_the_next_one_works(rig):
    rig.step(forward=False, load_starts=[load()])
    rig.receiver.next(wire.Await)
    rig.receiver.stop()
    _, received, failed = rig.until(lambda: not rig.worker._receivers[0]._by_req)
    assert (received, failed) == (["a"], ["a"])
    rig.receiver = FakeSidecar(rig.paths["receiver"], epoch=2)
    rig.wait_connected()
    rig.step(forward=False, load_starts=[load(name="b")])
    rig.receiver.next(wire.Await)
    landed, ready = land(rig)
    rig.receiver.say(ready)
    _, received, failed = rig.until(lambda: not rig.worker._receivers[0]._by_req)
    assert (received, failed) == (["b"], [])
    assert torch.equal(rig.kv(load().tables[0], 0, TOKENS), torch.cat(list(landed.values()), 2))


def test_a_sidecar_that_says_nothing_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("pd_sidecar.worker.ranks.GRACE_S", 0.0)
    rig = Rig(tmp_path, load_deadline_ms=500)
    rig.step(forward=False, load_starts=[load()])
    rig.receiver.next(wire.Await)
    _, received, failed = rig.until(lambda: not rig.worker._receivers[0]._by_req)
    assert (received, failed) == (["a"], ["a"])
    assert rig.stats.data["load_failures"] == {"deadline": 1}
    assert rig.receiver.next() == wire.Abort("r")
    rig.worker.close()


def test_only_a_step_without_tokens_and_with_something_under_way_waits(rig, monkeypatch):
    waits = []
    monkeypatch.setattr("pd_sidecar.worker.worker.wait_any", lambda clients, seconds: waits.append(seconds))
    rig.step(forward=False)
    rig.step(load_starts=[load()])
    rig.step()
    assert waits == []
    rig.step(forward=False)
    assert waits == [0.002]


def test_a_wait_ends_with_the_first_word_of_the_sidecar(tmp_path):
    rig = Rig(tmp_path, idle_wait_ms=5000)
    rig.step(load_starts=[load()])
    rig.receiver.next(wire.Await)
    rig.receiver.say(wire.Ended("r", "no_room", 0))
    began = time.monotonic()
    results = rig.step(forward=False)[1]
    assert set(results.failed) == {"a"}
    assert time.monotonic() - began < 4
    rig.worker.close()


def test_a_scheduler_that_asks_is_told_at_once_but_for_failures(tmp_path):
    rig = Rig(tmp_path, idle_wait_ms=5000)
    worker = rig.worker
    rig.step(load_starts=[load(), load(name="b", req="s")])
    assert worker.news(rest=False) == (set(), set())
    began = time.monotonic()
    assert rig.step(forward=False)[1].received == set()
    assert worker.idle_report == IdleReport(rests=True)
    assert time.monotonic() - began < 4  # `finish` does not wait; only `news` waits, if a scheduler calls it
    _, ready = land(rig)
    rig.receiver.say(ready)
    deadline = began + PATIENCE_S
    while (news := worker.news(rest=True)) == (set(), set()):
        assert time.monotonic() < deadline
    assert news == (set(), {"a"})
    rig.receiver.say(wire.Ended("s", "no_room", 0))
    while not worker.collect() and time.monotonic() < deadline:
        worker.read()
    assert worker.news(rest=True) == (set(), set())
    results = rig.step()[1]
    assert (results.received, set(results.failed)) == ({"b"}, {"b"})
    assert worker.idle_report == IdleReport(rests=False)
    worker.close()


@pytest.mark.parametrize("then", ["step", "lost"])
def test_what_has_arrived_is_told_at_once_and_scattered_before_it_is_used(rig, then):
    worker, start = rig.worker, load()
    worker.news(rest=False)
    rig.step(load_starts=[start])
    rig.receiver.next(wire.Await)
    landed, ready = land(rig)
    want = torch.cat(list(landed.values()), 2)
    rig.receiver.say(ready)
    deadline = time.monotonic() + PATIENCE_S
    while not worker.collect():
        worker.read()
        assert time.monotonic() < deadline
    assert worker.news(rest=False) == (set(), {"a"})
    assert not torch.equal(rig.kv(start.tables[0], 0, TOKENS), want)
    if then == "step":
        worker.begin(StepMetadata())
    else:
        # The slots stay mapped on this side, even after the sidecar has ended.
        rig.receiver.stop()
        while worker._receivers[0]._copier is not None:
            worker.read()
            assert time.monotonic() < deadline
    assert torch.equal(rig.kv(start.tables[0], 0, TOKENS), want)
    worker.move()
    assert rig.stats.data["loads"] == 1
    assert "load_failures" not in rig.stats.data
