"""Tests the client against a socket with the real framing."""

from __future__ import annotations

import os
import time

import pytest
from fake_sidecar import PATIENCE_S, FakeSidecar, raw, refusal

from pd_sidecar.client import Client, Connected, Lost, NotConnectedError, Pauses, default_socket
from pd_sidecar.sidecar import wire

LAYOUT = wire.Layout("m", "float", 2, 2, 4, False, 8)
HELLO = wire.Hello(wire.VERSION, "test", "prefill", 0, 1, LAYOUT)
TARGET = wire.Target("127.0.0.1", 7300, 7400)
QUICK = Pauses(first=0.01, longest=0.02, refused=0.02)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sidecar.sock"


@pytest.fixture
def clients():
    made = []
    yield made
    for client in made:
        client.close()


def connect(path, clients):
    client = Client.connect(str(path), HELLO)
    clients.append(client)
    return client


def until(client, kind, seconds=PATIENCE_S):
    """Returns the events up to the first of this kind."""
    events, deadline = [], time.monotonic() + seconds
    while time.monotonic() < deadline:
        events += client.wait(0.05)
        if any(isinstance(event, kind) for event in events):
            return events
    raise AssertionError(f"no {kind.__name__} in {events}")


def wait_until(holds, seconds=PATIENCE_S):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_messages_go_both_ways(path, clients):
    sidecar = FakeSidecar(path, slots=3, epoch=77)
    client = connect(path, clients)
    assert sidecar.hellos == [HELLO]
    assert (client.welcome.epoch, client.welcome.slots) == (77, 3)
    client.reserve("r", TARGET, ["k1", "k2"], tokens=12, upto=8, overlap=True)
    client.computing("r", 12)
    client.staged("r", [0, 1], 5)
    client.cancel("r")
    client.await_("r", ["k"], tokens=8, have_tokens=0, deadline_ms=100)
    client.release("r", [0], 3)
    client.abort("r")
    assert [sidecar.next() for _ in range(7)] == [
        wire.Reserve("r", TARGET, ["k1", "k2"], 12, 8, True),
        wire.Computing("r", 12),
        wire.Staged("r", [0, 1], 5),
        wire.Cancel("r"),
        wire.Await("r", ["k"], 8, 0, 100),
        wire.Release("r", [0], 3),
        wire.Abort("r"),
    ]
    answers = [
        wire.Granted("r", 4, [0], [2]),
        wire.Ready("r", 0, [1], [1]),
        wire.Ended("r", "no_room", 7),
    ]
    sidecar.say(*answers)
    events = until(client, wire.Ended)
    assert events == answers


def test_slots_are_the_sidecars_memory(path, clients):
    sidecar = FakeSidecar(path, slots=3)
    client = connect(path, clients)
    assert len(client.slot(2)) == LAYOUT.chunk_bytes == sidecar.slot_bytes
    client.slot(2)[:5] = b"chunk"
    assert sidecar.read(2, 5) == b"chunk"
    sidecar.write(0, b"landed")
    assert bytes(client.slot(0)[:6]) == b"landed"
    with pytest.raises(IndexError):
        client.slot(3)


def test_a_restarted_sidecar_is_found_again(path, clients):
    first = FakeSidecar(path, epoch=1)
    client = Client(str(path), HELLO, QUICK)
    clients.append(client)
    assert until(client, Connected) == [Connected(client.welcome)]
    client.slot(0)[:3] = b"old"
    view = client.slot(0)
    first.stop()
    until(client, Lost)
    with pytest.raises(NotConnectedError):
        client.cancel("r")
    second = FakeSidecar(path, epoch=2)
    until(client, Connected)
    assert client.welcome.epoch == 2
    assert bytes(client.slot(0)[:3]) == b"\0\0\0"
    assert bytes(view[:3]) == b"old"  # the old mapping stays as long as a view of it exists
    client.cancel("r")
    assert second.next() == wire.Cancel("r")


def test_a_restart_between_two_polls_is_a_loss_and_a_connection(path, clients):
    first = FakeSidecar(path, epoch=1)
    client = Client(str(path), HELLO, QUICK)
    clients.append(client)
    until(client, Connected)
    first.say(wire.Granted("r", 0, [0], [0]))
    first.stop()
    second = FakeSidecar(path, epoch=2)
    assert client._reconnector.connected.wait(PATIENCE_S)
    assert second.hellos
    assert [type(event) for event in client.poll()] == [Lost, Connected]
    assert client.welcome.epoch == 2


def test_an_absent_sidecar_is_waited_for_without_blocking(path, clients):
    client = Client(str(path), HELLO, QUICK)
    clients.append(client)
    began = time.monotonic()
    assert client.poll() == []
    assert time.monotonic() - began < PATIENCE_S
    assert not client.connected
    with pytest.raises(NotConnectedError):
        client.abort("r")
    sidecar = FakeSidecar(path)
    until(client, Connected)
    assert len(sidecar.hellos) == 1


def test_connect_gives_up_in_time(path):
    with pytest.raises(TimeoutError, match="No such file"):
        Client.connect(str(path), HELLO, timeout_s=1.0)


def test_a_refusal_says_why(path, caplog):
    FakeSidecar(path, refuse=wire.Refused("layout_mismatch", "dtype: half here, float there"))
    with caplog.at_level("WARNING"), pytest.raises(TimeoutError, match="half here, float there"):
        Client.connect(str(path), HELLO, timeout_s=2.0)
    assert "layout_mismatch" in caplog.text
    assert len(caplog.records) == 1


def test_while_it_is_refused_an_engine_keeps_its_sidecar_ready(path):
    """Without the extra connection the proxy would refuse every request, although the engine can compute it."""
    refused = wire.Refused("layout_mismatch", "set pd_buffer_size to 1 GiB")
    sidecar = FakeSidecar(path, refuse=refused)
    client = Client(str(path), HELLO, pauses=Pauses(first=0.01, refused=0.05))
    wait_until(lambda: len(sidecar.kept) == 1)
    assert "set pd_buffer_size to 1 GiB" in sidecar.kept[0].unmoved
    # The client repeats its own greeting all the time, but it opens the extra connection only once.
    wait_until(lambda: len(sidecar.hellos) >= 5)
    assert len(sidecar.kept) == 1
    sidecar.refuse = None
    wait_until(lambda: client.poll() or client.connected)
    client.close()


def test_the_successor_of_a_sidecar_that_refused_is_found_at_once(path):
    sidecar = FakeSidecar(path, refuse=wire.Refused("layout_mismatch", "too small"))
    client = Client(str(path), HELLO, pauses=Pauses(first=0.01, refused=60.0))
    wait_until(lambda: len(sidecar.kept) == 1)
    sidecar.stop()
    FakeSidecar(path)
    wait_until(lambda: client.poll() or client.connected)
    client.close()


def test_slots_of_another_size_are_refused(path):
    FakeSidecar(path, slot_bytes=LAYOUT.chunk_bytes - 8)
    assert "slots of" in refusal(path, HELLO)


def test_a_buffer_that_may_shrink_is_refused(path):
    FakeSidecar(path, sealed=False)
    assert "sealed" in refusal(path, HELLO)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xff\xff\xff",
        wire.HEADER.pack(3) + b"\xc1\xc1\xc1",
        raw({"type": "Granted", "req": "r", "have_tokens": 0, "chunks": [0], "slots": [8]}),
        raw({"type": "Ready", "req": "r", "first_token": 0, "chunks": [0, 1], "slots": [0]}),
        raw({"type": "Ready", "req": "r", "first_token": 0, "chunks": [0], "slots": [-1]}),
        raw({"type": "Nonsense"}),
        raw([1, 2]),
    ],
    ids=["huge", "undecodable", "no such slot", "uneven", "negative", "unknown", "no map"],
)
def test_a_sidecar_that_breaks_the_protocol_is_left(path, clients, garbage):
    sidecar = FakeSidecar(path, slots=8)
    client = Client(str(path), HELLO, QUICK)
    clients.append(client)
    until(client, Connected)
    sidecar.say_bytes(garbage)
    events = until(client, Lost)
    # The client connects again. One poll may return both events, `Lost` of the old connection and `Connected` of the
    # new connection.
    assert any(isinstance(event, Connected) for event in events) or until(client, Connected)


def test_a_message_that_no_frame_holds_is_not_sent(path, clients):
    sidecar = FakeSidecar(path)
    client = connect(path, clients)
    with pytest.raises(wire.WireError, match="exceeds"):
        client.reserve("r", TARGET, ["k" * 1000] * 2000, tokens=9, upto=9)
    client.cancel("r")
    assert sidecar.next() == wire.Cancel("r")


def test_the_default_path_can_be_named(monkeypatch):
    monkeypatch.delenv("PD_SIDECAR_SOCKET", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert default_socket("sender") == f"/tmp/pd-sidecar-{os.getuid()}/sender.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7/")
    assert default_socket("sender") == "/run/user/7/pd-sidecar/sender.sock"
    monkeypatch.setenv("PD_SIDECAR_SOCKET", "/run/x.sock")
    assert default_socket("receiver") == "/run/x.sock"


def test_keys_that_a_newer_sidecar_adds_are_ignored():
    frame = raw({"type": "Ended", "req": "r", "reason": None, "bytes": 3, "more": [1]})
    assert wire.decode_to_engine(frame[4:]) == wire.Ended("r", None, 3)


def test_frames_are_cut_wherever_the_stream_is():
    data = b"".join(wire.encode(wire.Ended(f"r{i}", None, i)) for i in range(5))
    for step in (1, 3, 7, len(data)):
        frames, seen = wire.FrameBuffer(), []
        for at in range(0, len(data), step):
            frames.feed(data[at : at + step])
            seen += [wire.decode_to_engine(body).req for body in frames.frames()]
        assert seen == [f"r{i}" for i in range(5)]
