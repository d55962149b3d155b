"""Tests a request that arrives during the greeting of a new connection to the sidecar."""

from __future__ import annotations

import threading
import time

import pytest
from fake_sidecar import PATIENCE_S, FakeSidecar
from test_worker import TABLE, TOKENS, Rig, load, push

from pd_sidecar.scheduler.metadata import PushStep
from pd_sidecar.sidecar import wire


class SlowSidecar(FakeSidecar):
    """Reads the greeting, and answers it when the test allows it. A real sidecar becomes ready at about the time of its
    answer.
    """

    def __init__(self, path):
        self.greeted = threading.Event()
        self.may_answer = threading.Event()
        super().__init__(path)

    def serve(self, connection, hello):
        self.greeted.set()
        self.may_answer.wait(PATIENCE_S)
        super().serve(connection, hello)


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path)
    yield rig
    rig.worker.close()


def restarted(rig, end):
    """Restarts one sidecar. Returns the new sidecar when it has received the engine's greeting."""
    getattr(rig, end).stop()
    sidecar = SlowSidecar(rig.paths[end])
    assert sidecar.greeted.wait(PATIENCE_S)
    return sidecar


def step(rig, name):
    rig.step(
        push_starts=[push()], push_steps=[PushStep("a", (TABLE,), True, TOKENS)], load_starts=[load(0, name, name)]
    )


@pytest.mark.parametrize("end", ["sender", "receiver"])
def test_a_request_during_the_greeting_uses_the_new_connection(rig, end, monkeypatch):
    monkeypatch.setattr("pd_sidecar.client.SETTLE_S", PATIENCE_S)
    sidecar = restarted(rig, end)
    threading.Timer(0.05, sidecar.may_answer.set).start()
    step(rig, "b")
    asked = sidecar.next(wire.Reserve if end == "sender" else wire.Await)
    assert asked.req == ("r" if end == "sender" else "b")
    assert not rig.stats.data.get("save_failures") and not rig.stats.data.get("load_failures")


def test_an_answer_that_does_not_come_delays_the_engine_once(rig, monkeypatch):
    # A step without a wait takes less than this time on a busy machine, too.
    settle_s = 2.0
    monkeypatch.setattr("pd_sidecar.client.SETTLE_S", settle_s)
    sidecar = restarted(rig, "receiver")
    began = time.monotonic()
    step(rig, "b")
    first = time.monotonic() - began
    assert settle_s <= first < PATIENCE_S
    began = time.monotonic()
    rig.step(load_starts=[load(0, "c", "c")])
    assert time.monotonic() - began < settle_s
    assert rig.stats.data["load_failures"] == {"no_sidecar": 2}
    sidecar.may_answer.set()
