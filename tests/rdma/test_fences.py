"""Ends or stops a sender in the middle of a write over real verbs, and watches the landing buffer.

The promise: no slot is reused while a write may still land in it. `Watcher` sees every byte that lands, whoever sent
it. The cable is slow, so a write of a megabyte takes about a second, and packets of a dead sender are still on the way.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.drop_in.chunks import Prompt
from harness.metrics import Metrics

from rdma.devices import ip, slow_cable
from rdma.sides import OTHER_HOST, Receiver, Sender, Watcher, watched

SLOTS = 24
CHUNKS = 6
FENCE_S = 1.0

# 6 chunks of 128 KiB take 0.8 s, and each packet is 300 ms on its way.
SLOW = ["rate", "8mbit", "delay", "300ms", "limit", "2000"]

# The time for which the tests watch the buffer after the slots are free. Nothing may land in this time.
AFTER_S = 3.0

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    made = Receiver(tmp_path_factory.mktemp("receiver"), SLOTS, fence_ms=int(FENCE_S * 1000), max_quarantined=8)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def other(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sender]:
    """A sender that is never disturbed."""
    made = Sender(receiver, "other", tmp_path_factory.mktemp("other"))
    yield made
    made.stop()


@pytest.fixture
def sender(receiver: Receiver, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Sender]:
    within = getattr(request, "param", [])
    made = Sender(receiver, f"sender-{next(_numbers)}", tmp_path, within)
    yield made
    made.stop()


def others_go_on(other: Sender, until: float) -> set[int]:
    """Pushes requests of the other sender up to a time. Returns the landing slots that they got."""
    used: set[int] = set()
    count = 0
    while time.monotonic() < until or not used:
        used |= other.push(f"other-{next(_numbers)}", Prompt.of_chunks(4, last=9))
        count += 1
    print(f"\nmeanwhile {count} requests of another sender arrived whole, in {len(used)} slots")
    return used


def begin(sender: Sender, watcher: Watcher, req: str, chunks: int = CHUNKS) -> None:
    """Begins a request, stages its first chunks, and returns when the first bytes have landed."""
    prompt = Prompt.of_chunks(CHUNKS)
    slots = sender.granted(req, prompt)
    sender.stage(req, prompt, dict(itertools.islice(slots.items(), chunks)))
    deadline = time.monotonic() + 30
    while not watcher.changes:
        assert time.monotonic() < deadline, "nothing lands"
        time.sleep(0.005)


def report(watcher: Watcher, what: str, at: float, freed: float) -> None:
    late = watcher.since(at)
    last = f"the last bytes after {(late[-1] - at) * 1000:.0f} ms" if late else "nothing"
    print(f"\n{what}: {len(late)} late changes, {last}; slots free after {(freed - at) * 1000:.0f} ms")


def check_nothing_lands_after(watcher: Watcher, freed: float) -> None:
    """Watches for a while longer. No request runs, so whatever lands is late."""
    time.sleep(AFTER_S)
    assert watcher.since(freed) == [], "bytes landed in slots that were free"


def test_kill_in_the_middle_of_a_write(receiver: Receiver, other: Sender, sender: Sender) -> None:
    """The receiver sees the end of the process, and frees the slots one second later."""
    sender.push(f"before-{sender.sidecar.name}", Prompt.of_chunks(2))
    other.push(f"other-{next(_numbers)}", Prompt.of_chunks(2))
    with watched(receiver) as watcher:
        with slow_cable(*SLOW, end="cable1"):
            begin(sender, watcher, "killed")
            killed = sender.kill()
            receiver.wait_quarantined(CHUNKS)
            freed = receiver.wait_empty()
        report(watcher, "kill -9", killed, freed)
        late = watcher.since(killed)
        assert late and late[-1] < freed, "the test shows nothing: no packet was on its way"
        check_nothing_lands_after(watcher, freed)
    assert others_go_on(other, 0)


def test_stop_in_the_middle_of_a_write_and_late_writes(receiver: Receiver, other: Sender, sender: Sender) -> None:
    """A stopped sender says nothing: its lease ends, and its slots wait until it says that its writes have ended."""
    sender.push(f"before-{sender.sidecar.name}", Prompt.of_chunks(2))
    assert sender.sidecar.process is not None
    with watched(receiver) as watcher:
        with slow_cable(*SLOW, end="cable1"):
            prompt = Prompt.of_chunks(CHUNKS)
            slots = sender.granted("stopped", prompt)
            first = dict(itertools.islice(slots.items(), CHUNKS // 2))
            sender.stage("stopped", prompt, first)
            deadline = time.monotonic() + 30
            while not watcher.changes:
                assert time.monotonic() < deadline, "nothing lands"
                time.sleep(0.005)
            sender.sidecar.process.signal(signal.SIGSTOP)
            stopped = time.monotonic()
            # The engine goes on: the sidecar finds these chunks when it continues.
            sender.stage("stopped", prompt, {c: s for c, s in slots.items() if c not in first})
            receiver.wait_quarantined(CHUNKS)
            print(f"\nin quarantine {time.monotonic() - stopped:.1f} s after SIGSTOP")
        used = others_go_on(other, time.monotonic() + 4)
        assert receiver.quarantined == CHUNKS, "only the sender itself can end this quarantine"
        continued = time.monotonic()
        sender.sidecar.process.signal(signal.SIGCONT)
        freed = receiver.wait_empty()
        report(watcher, "SIGCONT", continued, freed)
        assert not watcher.slots_since(continued) & used, "a late write reached a slot of another request"
        check_nothing_lands_after(watcher, freed)
    sender.push(f"again-{sender.sidecar.name}", Prompt.of_chunks(2))


@pytest.mark.parametrize("sender", [OTHER_HOST], indirect=True)
def test_a_sender_on_another_host_that_never_comes_back(receiver: Receiver, other: Sender, sender: Sender) -> None:
    sender.push(f"before-{sender.sidecar.name}", Prompt.of_chunks(2))
    with watched(receiver) as watcher:
        with slow_cable(*SLOW, end="cable1"):
            begin(sender, watcher, "gone")
            killed = sender.kill()
            receiver.wait_quarantined(CHUNKS)
            time.sleep(1)
            report(watcher, "kill -9 on another host", killed, float("inf"))
            dirty = watcher.slots_since(killed)
            assert dirty, "the test shows nothing: no packet was on its way"
        used = others_go_on(other, killed + 4 * FENCE_S + 2)
        assert not used & dirty, "another request got a slot in which a write could still land"
        assert receiver.quarantined == CHUNKS, "nobody has said that the sender has ended"
        shown = Metrics.scrape(f"{receiver.sidecar.admin}/metrics")
        assert shown.sum("pd_sidecar_slots", state="quarantined") == CHUNKS
        # Its next process proves that it has ended.
        sender.start()
        proved = time.monotonic()
        sender.push(f"back-{sender.sidecar.name}", Prompt.of_chunks(2))
        freed = receiver.wait_empty()
        print(f"\nits next process had started {freed - proved:.1f} s before the slots were free")
        assert freed - proved > FENCE_S / 2
        check_nothing_lands_after(watcher, freed)


@pytest.mark.parametrize("sender", [OTHER_HOST], indirect=True)
def test_no_byte_of_a_dead_sender_is_sent_again(receiver: Receiver, sender: Sender) -> None:
    """Over TCP the kernel repeats the data of a dead process. A device drops the connection of a dead process."""
    sender.push(f"before-{sender.sidecar.name}", Prompt.of_chunks(2))
    with watched(receiver) as watcher:
        with slow_cable(*SLOW, end="cable1"):
            begin(sender, watcher, "cut")
            ip("link", "set", "cable1", "down")
            killed = sender.kill()
            # Packets that were beyond the cable when it was cut.
            time.sleep(1)
        receiver.wait_quarantined(CHUNKS)
        ip("link", "set", "cable1", "up")
        up = time.monotonic()
        time.sleep(10)
        print(f"\ncable cut, kill -9, cable back: {len(watcher.since(up))} changes in the 10 s after it")
        assert watcher.since(up) == [] and up - killed < 30
        sender.start()
        sender.push(f"back-{sender.sidecar.name}", Prompt.of_chunks(2))
        receiver.wait_empty()
