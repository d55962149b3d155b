"""Checks the order of moves that are still in flight after their launch. The moves run on a fake device that ends a
move when the test says so.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import test_worker
from test_worker import LAYERS, TABLE, TOKENS, Rig, load, push

from pd_sidecar.kv.host_copy import HostCopier
from pd_sidecar.scheduler.metadata import PushStart, PushStep, StepMetadata
from pd_sidecar.sidecar import wire
from pd_sidecar.worker import worker


class Move:
    def __init__(self, kind, after):
        self.kind = kind
        self.after = list(after)
        self.over = False
        self.seconds = 0.001

    def done(self):
        return self.over


class Layers:
    """Implements `copier.LayeredCopy`."""

    def __init__(self, device, host, pieces):
        self.device, self.host, self.pieces = device, host, pieces
        self.ranges = []
        device.layered_copies.append(self)

    def gather(self, below, signal):
        self.ranges.append((below, signal))
        self.host.gather(self.pieces)

    @property
    def fence(self):
        return self.device.moved("gather", ())


class Slow:
    """Implements `copier.Device`."""

    def __init__(self, events):
        self.name = None
        self.events = [bytes([48 + number]) * 64 for number in range(events)]
        self.is_asynchronous = True
        self.moves = []
        self.held = []
        self.layered_copies = []
        self.last = []
        self.marks = 0

    def enter(self):
        pass

    def mark(self):
        self.marks += 1
        return self.marks

    def hold(self, fence):
        self.held.append(fence)

    def copier(self, pages, connection):
        host = HostCopier(pages.only, connection.memory, connection.welcome.slot_bytes)
        device = self

        class Copier:
            def gather(self, pieces, after, signal=None, *, last=False):
                host.gather(pieces)
                device.last.append(last)
                return device.moved("gather", after)

            def layered_copy(self, pieces):
                return Layers(device, host, pieces)

            def scatter(self, pieces, after):
                host.scatter(pieces)
                return device.moved("scatter", after)

        return Copier()

    def moved(self, kind, after):
        self.moves.append(Move(kind, after))
        return self.moves[-1]


@pytest.fixture
def device(request):
    return Slow(getattr(request, "param", 2))


@pytest.fixture
def rig(tmp_path, monkeypatch, device):
    monkeypatch.setattr(worker, "device_of", lambda *_, **__: device)
    rig = Rig(tmp_path)
    yield rig
    rig.worker.close()


def begin(rig, name, req):
    start = PushStart(name, req, "h", (7300,), (7400,), test_worker.HASHES, TOKENS, True)
    rig.step(push_starts=[start], push_steps=[PushStep(name, (TABLE,), True, TOKENS)])
    rig.sender.next(wire.Reserve)


def test_the_sidecar_is_told_at_the_launch_and_blocks_are_held_to_the_end(rig, device):
    rig.step(push_starts=[push()], push_steps=[PushStep("a", (TABLE,), True, TOKENS)])
    rig.sender.next(wire.Reserve)
    rig.step(forward=False, finished=["a"])
    rig.sender.say(wire.Granted("r", 0, [0, 1, 2], [1, 2, 3]))
    # No step runs here: the poller's thread launches the gather.
    staged = rig.sender.next(wire.Staged)
    assert staged.chunks == [0, 1, 2]
    assert staged.event in (0, 1)
    assert device.moves[0].after == [1], "not behind the forward"
    # The sidecar pushes the chunks, and finishes before this side has seen the end of the gather.
    rig.sender.say(wire.Ended("r", None, 10))
    for _ in range(3):
        assert rig.step(forward=False)[0] == set()
    device.moves[0].over = True
    assert rig.until(lambda: not rig.worker._senders[0]._by_req)[0] == ["a"]
    assert rig.stats.data["saves"] == 1


def test_an_event_is_named_again_only_when_it_was_answered(rig, device):
    events = []
    for name, req in (("a", "r1"), ("b", "r2"), ("c", "r3")):
        begin(rig, name, req)
        rig.sender.say(wire.Granted(req, 0, [0], [1]))
        if name != "c":
            events.append(rig.sender.next(wire.Staged).event)
    assert sorted(events) == [0, 1]
    # The third gather has no event, so the worker announces this gather only when it is over.
    rig.until(lambda: len(device.moves) == 3)
    assert rig.sender.nothing()
    device.moves[2].over = True
    rig.until(lambda: not rig.sender.nothing())
    assert rig.sender.next(wire.Staged).event is None
    rig.sender.say(wire.Ended("r1", "cancelled", 0))
    rig.until(lambda: rig.worker._senders[0]._by_req["r1"].over)
    begin(rig, "d", "r4")
    rig.sender.say(wire.Granted("r4", 0, [0], [4]))
    assert rig.sender.next(wire.Staged).event == events[0]


@pytest.fixture
def layered(rig, monkeypatch):
    """Makes the worker gather by layers. A range ends after each layer except the last."""
    monkeypatch.setattr("pd_sidecar.worker.push.SPARE_EVENTS", LAYERS)
    rig.worker._range_ends = {f"layers.{below - 1}": below for below in range(1, LAYERS)}
    rig.worker._senders[0]._rank = replace(rig.worker._senders[0]._rank, by_layers=True)
    return rig


def launch(rig, names, *granted):
    """Runs a forward. Each entry of `granted` names the layer after which the sidecar grants slots to these chunks. If
    the name is empty, the sidecar grants the slots directly after the announcement.
    """
    start = PushStart("a", "r", "h", (7300,), (7400,), test_worker.HASHES, TOKENS, True)
    steps = [PushStep("a", (TABLE,), True, TOKENS)]
    rig.worker.begin(StepMetadata(push_starts=[start], push_steps=steps))
    rig.sender.next(wire.Reserve)
    for name in ["", *names]:
        if name:
            rig.worker.layer_computed(name)
        for when, chunks in granted:
            if when == name:
                rig.sender.say(wire.Granted("r", 0, chunks, [chunk + 1 for chunk in chunks]))
    rig.worker.computed()
    rig.worker.finish()


SIGNALS = 8
many_events = pytest.mark.parametrize("device", [SIGNALS], indirect=True)
NAMES = [f"layers.{number}" for number in range(LAYERS)]


@many_events
def test_layers_are_gathered_within_the_forward_and_named_when_it_is_launched(layered, device):
    launch(layered, NAMES, ("", [0, 1, 2]))
    staged = layered.sender.next(wire.Staged)
    assert staged.chunks == [0, 1, 2]
    assert [part.below for part in staged.layers] == list(range(1, LAYERS + 1))
    assert staged.layers[-1].event == staged.event
    (layered_copy,) = device.layered_copies
    assert [(part.below, part.event) for part in staged.layers] == layered_copy.ranges
    assert not device.last, "gathered twice"
    assert layered.sender.nothing()
    assert layered.stats.data["layered_tokens"] == TOKENS
    device.moves[0].over = True
    layered.sender.say(wire.Ended("r", None, 10))
    layered.until(lambda: layered.stats.data.get("saves") == 1)


@many_events
def test_slots_that_come_within_the_forward_are_in_time_for_the_layers_that_follow(layered, device):
    # Layers 0 and 1 of chunks 0 and 2 are in the first range. Chunk 1 is gathered after the forward.
    launch(layered, NAMES, (NAMES[0], [0, 2]), (NAMES[-1], [1]))
    staged = layered.sender.next(wire.Staged)
    assert (staged.chunks, [part.below for part in staged.layers]) == (
        [0, 2],
        list(range(2, LAYERS + 1)),
    )
    rest = layered.sender.next(wire.Staged)
    assert (rest.chunks, rest.layers) == ([1], [])
    assert device.last == [True]


@many_events
@pytest.mark.parametrize("gains", [False, True])
def test_the_sidecar_says_whether_layers_are_of_use(layered, device, gains):
    sender = layered.worker._senders[0]
    sender._rank = replace(sender._rank, by_layers=False)
    launched = sender.layers_computed

    def layers_computed(below):
        if below == 1:
            layered.sender.say(wire.Granted("r", 0, [0, 1, 2], [1, 2, 3], layers=gains))
            layered.worker.read()
        launched(below)

    sender.layers_computed = layers_computed
    launch(layered, NAMES)
    assert bool(layered.sender.next(wire.Staged).layers) is gains
    assert len(device.layered_copies) == gains


@many_events
def test_a_step_in_several_forwards_is_gathered_as_a_whole(layered, device):
    # The two halves of the batch run in turn. After the first half, a layer's KV is not complete.
    names = [name for name in NAMES for _ in range(2)]
    launch(layered, names, ("", [0, 1, 2]))
    staged = layered.sender.next(wire.Staged)
    assert (staged.chunks, staged.layers) == ([0, 1, 2], [])
    assert len(device.layered_copies[0].ranges) == 1, "went on after the second half"
    assert device.last == [True]
    # No message to the sidecar named the event of this range, so the event is free.
    assert len(layered.worker._senders[0]._event_slots._free) == SIGNALS - 1


def before_layer(rig, below, act):
    """Calls `act` just before the connector learns that the first `below` layers are computed."""
    sender = rig.worker._senders[0]
    launched = sender.layers_computed

    def layers_computed(layers):
        if layers == below:
            act(sender)
            rig.worker.read()
        launched(layers)

    sender.layers_computed = layers_computed
    return sender


@many_events
@pytest.mark.parametrize("what", ["ended", "lost"])
def test_ranges_of_a_request_that_ends_within_the_forward_are_waited_for(layered, device, what):
    def act(sender):
        if what == "ended":
            layered.sender.say(wire.Ended("r", "peer_lost", 0))
        else:
            sender.lost()

    sender = before_layer(layered, 2, act)
    launch(layered, NAMES, ("", [0, 1, 2]))
    assert len(device.layered_copies[0].ranges) == 1
    assert layered.sender.nothing()
    assert not device.last
    # The launched range still reads blocks, and writes into the sidecar's memory.
    assert sender._by_req["r"].gathering == 1
    layered.step(forward=False, finished=["a"])
    assert layered.step(forward=False)[0] == set()
    device.moves[0].over = True
    assert layered.until(lambda: not sender._by_req)[0] == ["a"]
    assert sender._event_slots.free == SIGNALS


@many_events
def test_an_event_of_a_request_that_ends_within_the_forward_is_taken_once(layered, device):
    begin(layered, "other", "s")

    def act(sender):
        # The slots go to the other request, whose chunk is gathered at once.
        layered.sender.say(wire.Ended("r", "peer_lost", 0))
        layered.sender.say(wire.Granted("s", 0, [0], [1]))
        layered.worker.move()

    sender = before_layer(layered, 2, act)
    launch(layered, NAMES, ("", [0, 1, 2]))
    staged = layered.sender.next(wire.Staged)
    assert (staged.req, staged.layers) == ("s", [])
    assert staged.event not in sender._event_slots._free
    assert sender._event_slots.free == SIGNALS - 1


@many_events
def test_without_spare_events_a_step_is_gathered_as_a_whole(layered, device, monkeypatch):
    monkeypatch.setattr("pd_sidecar.worker.push.SPARE_EVENTS", SIGNALS + 1)
    launch(layered, NAMES, ("", [0, 1, 2]))
    assert (layered.sender.next(wire.Staged).layers, device.layered_copies) == ([], [])


@many_events
def test_what_is_complete_does_not_wait_for_another_forward(layered, device):
    launch(layered, NAMES, ("", [0]))
    layered.sender.next(wire.Staged)
    layered.worker.begin(StepMetadata(push_steps=[PushStep("a", ([],), False, TOKENS)]))
    with layered.worker.lock:  # keeps the poller's thread from gathering first
        layered.sender.say(wire.Granted("r", 0, [1, 2], [2, 3]))
        for name in NAMES:
            layered.worker.layer_computed(name)
    assert len(device.layered_copies) == 1
    staged = layered.sender.next(wire.Staged)
    assert (staged.chunks, staged.layers) == ([1, 2], [])
    layered.worker.computed()


def test_layers_of_a_draft_model_are_not_taken_for_the_first_ones():
    own = [f"model.layers.{number}.self_attn.attn" for number in range(40)]
    assert worker._is_one_model(own)
    assert not worker._is_one_model([f"draft_{name}" for name in own[:8]] + own)


@pytest.mark.parametrize("how", ["preempted", "cancelled"])
def test_whoever_gets_the_blocks_comes_after_the_gather(rig, device, how):
    begin(rig, "a", "r")
    rig.sender.say(wire.Granted("r", 0, [0], [1]))
    rig.sender.next(wire.Staged)
    assert not device.held
    rig.step(forward=False, **{how: ["a"]})
    assert device.held == [device.moves[0]]


def test_a_gather_knows_whether_the_engine_has_launched_anything_since(rig, device):
    begin(rig, "a", "r")
    rig.sender.say(wire.Granted("r", 0, [0], [1]))
    rig.sender.next(wire.Staged)
    rig.step(forward=False, aborted=["nobody"])
    rig.sender.say(wire.Granted("r", 0, [1], [2]))
    rig.sender.next(wire.Staged)
    rig.worker.begin(StepMetadata())
    rig.sender.say(wire.Granted("r", 0, [2], [3]))
    deadline = time.monotonic() + 60
    while len(device.moves) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    assert device.last == [True, True, False]


def test_a_load_is_reported_when_it_has_arrived_and_what_is_computed_waits_for_it(rig, device):
    rig.step(forward=False, load_starts=[load()])
    rig.receiver.next(wire.Await)
    rig.receiver.say(wire.Ready("r", 0, [0, 1], [1, 2]))
    rig.until(lambda: device.moves)
    assert rig.step(forward=False)[1].received == set(), "a chunk is missing"
    rig.receiver.say(wire.Ready("r", 0, [2], [3]))
    _, received, failed = rig.until(lambda: not rig.worker._receivers[0]._by_req)
    assert (received, failed) == (["a"], [])
    assert device.moves[0].after == [1], "not behind what may write to its blocks"
    # Run the step that uses the chunks.
    device.held.clear()
    rig.step()
    assert device.held == device.moves
    # The slots are not released before the scatters have read them.
    time.sleep(0.05)
    assert rig.receiver.nothing()
    for move in device.moves:
        move.over = True
    released = [rig.receiver.next(wire.Release) for _ in device.moves]
    assert sorted(chunk for message in released for chunk in message.chunks) == [0, 1, 2]
    rig.until(lambda: "loads" in rig.stats.data)


def test_a_load_that_failed_is_reported_when_nothing_writes_to_its_blocks(rig, device):
    rig.step(forward=False, load_starts=[load()])
    rig.receiver.next(wire.Await)
    rig.receiver.say(wire.Ready("r", 0, [0], [1]))
    rig.until(lambda: device.moves)
    rig.receiver.say(wire.Ended("r", "stalled", 0))
    rig.until(lambda: rig.worker._receivers[0]._by_req["r"].failure)
    for _ in range(3):
        assert rig.step(forward=False)[1].received == set()
    assert rig.receiver.nothing(), "an abort says that no slot is read any more"
    device.moves[0].over = True
    _, received, failed = rig.until(lambda: not rig.worker._receivers[0]._by_req)
    assert (received, failed) == (["a"], ["a"])


def test_what_a_step_without_tokens_has_ended_is_named_at_once(rig, device, monkeypatch):
    monkeypatch.setattr("pd_sidecar.worker.poller.LONGEST_S", 60)
    rig.step(load_starts=[load()])
    rig.receiver.next(wire.Await)
    time.sleep(0.1)  # the thread is asleep
    results = rig.step(forward=False, aborted=["a"])[1]
    _, received, _ = rig.until(lambda: not rig.worker._receivers[0]._by_req)
    assert [*results.received, *received] == ["a"]
