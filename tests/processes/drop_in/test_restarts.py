"""Tests a sidecar with LMCache as its peer. The sidecar or the peer dies between two requests, or does not answer."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import zmq
from harness.drop_in.chunks import Prompt
from harness.drop_in.nodes import BOUND_S, LmcacheReceiver, LmcacheSender, OurReceiver, OurSender, of_targets

from pd_sidecar.sidecar.wire import Target

MODES = ("sync", "async")
# A request of LMCache's gets an answer within 5 s. Within this lease, a test can send two more and then read the first.
LEASE_MS = 12_000
# A decode request waits for 15 s if nothing ends its wait.
SOON_S = 14.0
_requests = itertools.count(1)


def next_request() -> str:
    return f"x{next(_requests)}"


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[OurReceiver]:
    made = OurReceiver(tmp_path, slots=8, max_lease_ms=LEASE_MS)
    yield made
    made.stop()


@pytest.fixture
def our_sender(tmp_path: Path) -> Iterator[OurSender]:
    made = OurSender(tmp_path)
    yield made
    made.stop()
    made.notices.close()


def moved(sender: OurSender | LmcacheSender, receiver: OurReceiver | LmcacheReceiver, prompt: Prompt) -> bool:
    req = next_request()
    put = sender.put(req, receiver.target, prompt)
    assert put.error is None, put
    assert sender.notices.wait(req) is not None
    return receiver.get(req, prompt) == prompt.sums


def halt(pid: int) -> None:
    """Sends SIGSTOP and returns when every thread has stopped, which takes a moment on a busy machine."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    deadline = time.monotonic() + BOUND_S
    while any((task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("mode", MODES)
def test_lmcache_sender_and_our_receiver(ours: OurReceiver, mode: str) -> None:
    sender = LmcacheSender(mode)
    try:
        assert moved(sender, ours, Prompt.of_chunks(3))

        # Kill the sender, and start a new one in its place.
        sender.restart()
        assert moved(sender, ours, Prompt.of_chunks(3))

        # An LMCache sender makes only one handshake in its life, so after the sidecar's restart the sender knows only
        # old addresses. The sidecar answers that all chunks were sent already. The sender then notifies the proxy at
        # once, and the decode side computes the prompt.
        ours.restart()
        began = time.monotonic()
        prompt, req = Prompt.of_chunks(3), next_request()
        put = sender.put(req, ours.target, prompt)
        assert (put.written, put.error) == (3, None)
        assert sender.notices.wait(req) is not None
        assert ours.get(req, prompt) == [None] * 3
        assert ours.ended in ("stale_epoch", "no_sender")
        assert time.monotonic() - began < SOON_S
        assert ours.sidecar.slots() == (8, 0, 0)

        sender.restart()
        assert moved(sender, ours, Prompt.of_chunks(3))
        ours.sidecar.wait_empty()
    finally:
        sender.stop()
        sender.notices.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_full_buffer_is_answered_as_lmcache_understands_it(ours: OurReceiver, mode: str) -> None:
    sender = LmcacheSender(mode)
    try:
        # A decode request must read this prompt. If no request has read KV of a sender yet, the sidecar frees the
        # sender's KV to make room for its next request.
        assert moved(sender, ours, Prompt.of_chunks(1))
        first, second, huge = Prompt.of_chunks(6), Prompt.of_chunks(6), Prompt.of_chunks(9)
        requests = {prompt: next_request() for prompt in (first, second, huge)}
        for prompt in (first, second, huge):
            began = time.monotonic()
            assert sender.put(requests[prompt], ours.target, prompt).error is None
            assert sender.notices.wait(requests[prompt]) is not None
            assert time.monotonic() - began < SOON_S
        assert ours.get(requests[first], first) == first.sums
        assert ours.get(requests[second], second) == [None] * 6
        assert ours.ended == ("no_room" if mode == "async" else "no_sender")
        assert ours.get(requests[huge], huge) == [None] * 9
        assert ours.ended == ("too_large" if mode == "async" else "no_sender")
        # If no request fetches the chunks, the sidecar frees their slots when their lease ends.
        third = Prompt.of_chunks(6)
        assert sender.put(next_request(), ours.target, third).error is None
        assert ours.sidecar.slots() == (2, 6, 0)
        ours.sidecar.wait_empty()
        assert moved(sender, ours, Prompt.of_chunks(8))
    finally:
        sender.stop()
        sender.notices.close()


def test_a_request_that_lmcache_cancels(ours: OurReceiver) -> None:
    """Cancels a request between its first and its last step. The request's granted and reserved slots become free at
    once.
    """
    sender = LmcacheSender("async")
    try:
        req, prompt = next_request(), Prompt.of_chunks(4)
        begun = sender.do(
            "put", req=req, to=of_targets([ours.target]), keys=prompt.keys, tokens=prompt.tokens, seed=prompt.seed,
            total_chunks=6, last=False,
        )  # fmt: skip
        assert begun == {"written": 4, "errors": []}
        assert ours.held() == 6
        sender.do("cancel", req=req)
        # The lease of the slots is longer than this wait.
        ours.sidecar.wait_empty(LEASE_MS / 1000 * 0.8)
        assert ours.sidecar.record(req)["reason"] == "cancelled"
        assert moved(sender, ours, Prompt.of_chunks(8))
    finally:
        sender.stop()
        sender.notices.close()


def test_two_senders_of_one_prompt(ours: OurReceiver) -> None:
    senders = [LmcacheSender("sync"), LmcacheSender("async")]
    try:
        prompt = Prompt.of_chunks(4)
        requests = [next_request() for _ in senders]
        for sender, req in zip(senders, requests, strict=True):
            assert sender.put(req, ours.target, prompt).error is None
            assert sender.notices.wait(req) is not None
        for req in requests:
            assert ours.get(req, prompt) == prompt.sums
        ours.sidecar.wait_empty()
    finally:
        for sender in senders:
            sender.stop()
            sender.notices.close()


@pytest.mark.parametrize("mode", MODES)
def test_our_sender_and_lmcache_receiver(our_sender: OurSender, mode: str) -> None:
    receiver = LmcacheReceiver(mode, slots=8)
    try:
        assert moved(our_sender, receiver, Prompt.of_chunks(3))
        receiver.restart()
        assert moved(our_sender, receiver, Prompt.of_chunks(3))
        our_sender.restart()
        assert moved(our_sender, receiver, Prompt.of_chunks(3))

        # A stopped receiver delays its requests up to their time limit. Later requests are not affected.
        halt(receiver.pid)
        req, prompt = next_request(), Prompt.of_chunks(2)
        began = time.monotonic()
        put = our_sender.put(req, receiver.target, prompt)
        assert put.error in ("alloc_timeout", "transfer_failed"), put
        assert time.monotonic() - began < BOUND_S
        notice = our_sender.notices.wait(req)
        assert notice is not None and notice["x"]["ok"] is False
        os.kill(receiver.pid, signal.SIGCONT)
        assert moved(our_sender, receiver, Prompt.of_chunks(3))
        if mode == "async":
            # The receiver's late answer granted slots that no sender will write. The sidecar must return these slots.
            deadline = time.monotonic() + BOUND_S
            while receiver.do("held")["keys"] and time.monotonic() < deadline:
                time.sleep(0.1)
            assert receiver.do("held")["keys"] == 0
        our_sender.sidecar.wait_empty()
    finally:
        receiver.stop()


def test_a_full_lmcache_receiver(our_sender: OurSender) -> None:
    receiver = LmcacheReceiver("async", slots=4)
    try:
        first, second = Prompt.of_chunks(3), Prompt.of_chunks(3)
        first_req, second_req = next_request(), next_request()
        assert our_sender.put(first_req, receiver.target, first).error is None
        assert our_sender.put(second_req, receiver.target, second).error == "alloc_timeout"
        assert receiver.get(first_req, first) == first.sums
        assert moved(our_sender, receiver, Prompt.of_chunks(4))
        # Push a request that is larger than the whole buffer. The receiver answers -1 at once.
        assert our_sender.put(next_request(), receiver.target, Prompt.of_chunks(5)).error == "no_room"
        assert moved(our_sender, receiver, Prompt.of_chunks(4))
    finally:
        receiver.stop()


def test_nothing_to_move_is_said_at_once(our_sender: OurSender) -> None:
    receiver = LmcacheReceiver("sync", slots=2)
    try:
        req = next_request()
        put = our_sender.put(req, receiver.target, Prompt.of_chunks(0))
        assert (put.written, put.error) == (0, None)
        notice = our_sender.notices.wait(req)
        assert notice is not None and notice["x"]["ok"] is True
        assert receiver.do("held")["keys"] == 0
    finally:
        receiver.stop()


def test_a_receiver_that_sends_a_program_for_its_pages(
    our_sender: OurSender, ours: OurReceiver, tmp_path: Path
) -> None:
    """Answers the registration with a pickle that runs a program.

    LMCache loads this answer with pickle, which would run the program. The sidecar accepts only a list of pages, so it
    refuses the answer and does not connect.
    """
    context = zmq.Context.instance()
    mark, req, prompt = tmp_path / "was run", next_request(), Prompt.of_chunks(2)

    class Program:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(mark),)

    with context.socket(zmq.REP) as near, context.socket(zmq.REQ) as far, ThreadPoolExecutor() as pool:
        near.linger = far.linger = 0
        port = near.bind_to_random_port("tcp://127.0.0.1")
        far.connect(f"tcp://127.0.0.1:{ours.target.init_port}")
        put = pool.submit(our_sender.put, req, Target("127.0.0.1", port, ours.target.alloc_port), prompt)
        # A real receiver makes the handshake, but this test removes the field `x`. So the sender treats the receiver as
        # LMCache.
        assert near.poll(20_000)
        asked = msgspec.msgpack.decode(near.recv())
        del asked["x"]
        far.send(msgspec.msgpack.encode(asked))
        assert far.poll(20_000)
        near.send(far.recv())
        assert near.poll(20_000)
        assert msgspec.msgpack.decode(near.recv())["type"] == "NixlMemRegRequest"
        answer = {"type": "NixlMemRegResponse", "remote_xfer_dlist_bytes": pickle.dumps(Program(), protocol=4)}
        near.send(msgspec.msgpack.encode(answer))
        assert put.result(BOUND_S).error == "no_link"
    assert not mark.exists()
    notice = our_sender.notices.wait(req)
    assert notice is not None and notice["x"]["ok"] is False
    assert moved(our_sender, ours, Prompt.of_chunks(3))


def test_the_query_port_knows_of_nothing(tmp_path: Path) -> None:
    from harness.ports import free_port

    port = free_port()
    ours = OurReceiver(tmp_path, slots=8, lmcache={"pd_peer_query_port": [port]})
    sender = LmcacheSender("sync")
    try:
        to = {"host": "127.0.0.1", "query_port": port}
        answer = sender.do("query", to=to, keys=Prompt.of_chunks(2).keys)
        assert answer == {"keys": [], "indexes": []}
    finally:
        sender.stop()
        sender.notices.close()
        ours.stop()
