"""Moves requests between two sidecars as processes, and between a sidecar and LMCache's backends, over real verbs.

The packet counters of the devices prove that the bytes went by verbs: UCX may use nothing else.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness.drop_in import forked
from harness.drop_in.chunks import TOKEN_BYTES, Prompt
from harness.drop_in.nodes import LmcacheReceiver, LmcacheSender, OurReceiver, OurSender, Receiver, Sender

from rdma.devices import LINK_MS, NO_SENDER_MS, RC, counted, environment, ip, with_systems_libibverbs

_requests = itertools.count(1)

# Less than a request of 200 chunks needs, so that the request gets its slots one after the other.
FEW_SLOTS = 24
BOTH = {**RC, "UCX_NET_DEVICES": "rxe0:1,rxe1:1"}


def pair(env: dict[str, str], folder: Path, stack: ExitStack) -> tuple[OurSender, OurReceiver]:
    """Starts two sidecars. RDMA needs no consent to TCP ports of UCX."""
    stack.enter_context(environment(env))
    receiver = OurReceiver(folder, nixl_over_tcp="refused", checksum=True, no_sender_ms=NO_SENDER_MS, park_ms=3000)
    stack.callback(stop, receiver)
    sender = OurSender(folder, nixl_over_tcp="refused", checksum=True, link_ms=LINK_MS)
    stack.callback(stop, sender)
    return sender, receiver


def stop(side: OurSender | OurReceiver) -> None:
    """Stops a sidecar. Its process must end without a fault of the libraries below NIXL."""
    side.stop()
    process = side.sidecar.process
    assert process is not None
    assert process.exit_code == 0, process.tail()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OurSender, OurReceiver]]:
    with ExitStack() as stack:
        yield pair(RC, tmp_path_factory.mktemp("pair"), stack)


def push(sender: Sender, receiver: Receiver, prompt: Prompt, *, parked: bool) -> str:
    """Moves a prompt and compares every chunk. Returns the id of the request."""
    req = f"r{next(_requests)}"
    with counted() as sent, ThreadPoolExecutor() as pool:
        if parked:
            assert isinstance(receiver, OurReceiver)
            waiting = pool.submit(receiver.get, req, prompt, written=False)
            put = sender.put(req, receiver.target, prompt)
            sums = waiting.result()
        else:
            put = sender.put(req, receiver.target, prompt)
            assert sender.notices.wait(req) is not None, "no notice to the proxy"
            sums = receiver.get(req, prompt)
    assert (put.written, put.error) == (prompt.chunks, None), put
    assert sums == prompt.sums
    size = prompt.tokens * TOKEN_BYTES
    print(f"\n{req}: {prompt.chunks} chunks, {size} bytes, parked: {parked}; {sent}")
    assert sent.carries(size), "the bytes did not go by verbs"
    return req


@pytest.mark.parametrize("parked", [True, False], ids=["parked", "unparked"])
@pytest.mark.parametrize("chunks", [1, 17, 200])
def test_every_chunk_arrives(ours: tuple[OurSender, OurReceiver], chunks: int, parked: bool) -> None:
    sender, receiver = ours
    req = push(sender, receiver, Prompt.of_chunks(chunks, last=100), parked=parked)
    record = sender.sidecar.record(req)
    assert (record["transport"], record["reason"], record["chunks"]) == ("nixl", None, chunks), record
    assert receiver.held() == 0


def test_a_window_that_moves_on(ours: tuple[OurSender, OurReceiver], tmp_path: Path) -> None:
    sender, _ = ours
    with environment(RC):
        few = OurReceiver(
            tmp_path, name="few", nixl_over_tcp="refused", checksum=True, no_sender_ms=NO_SENDER_MS, park_ms=3000
        )
        few.stop()
        few.sidecar.options.buffer_bytes = few.sidecar.options.buffer_bytes // few.slots * FEW_SLOTS
        few.sidecar.start()
        few._connect()
    try:
        req = push(sender, few, Prompt.of_chunks(200, last=9), parked=True)
        assert few.sidecar.slots()[0] == FEW_SLOTS
        assert sender.sidecar.record(req)["windowed"] >= 200 - FEW_SLOTS
    finally:
        few.stop()


def test_two_devices(tmp_path: Path) -> None:
    with ExitStack() as stack:
        sender, receiver = pair(BOTH, tmp_path, stack)
        push(sender, receiver, Prompt.of_chunks(17, last=3), parked=True)


def test_a_device_that_goes_down_and_comes_back(tmp_path: Path) -> None:
    """The request ends with a reason while the cable is out; requests after it arrive, without a restart."""
    with ExitStack() as stack:
        with environment(RC):
            receiver = OurReceiver(tmp_path, nixl_over_tcp="refused", no_sender_ms=NO_SENDER_MS, park_ms=3000)
        stack.callback(receiver.stop)
        with environment({**RC, "UCX_NET_DEVICES": "rxe1:1"}):
            sender = OurSender(tmp_path, nixl_over_tcp="refused", stall_ms=20_000, link_ms=LINK_MS)
        stack.callback(sender.stop)
        push(sender, receiver, Prompt.of_chunks(3), parked=True)
        ip("link", "set", "cable0", "down")
        began = time.monotonic()
        try:
            with ThreadPoolExecutor() as pool:
                prompt = Prompt.of_chunks(3)
                waiting = pool.submit(receiver.get, "down", prompt, written=False)
                put = sender.put("down", receiver.target, prompt)
                waiting.result()
            print(f"\ndown: the sender ended with {put.error}, the receiver with {receiver.ended}, "
                  f"after {time.monotonic() - began:.1f} s")  # fmt: skip
            assert put.error and receiver.ended
        finally:
            ip("link", "set", "cable0", "up")
        up = time.monotonic()
        while True:
            prompt, req = Prompt.of_chunks(3), f"up-{next(_requests)}"
            with ThreadPoolExecutor() as pool:
                waiting = pool.submit(receiver.get, req, prompt, written=False)
                put = sender.put(req, receiver.target, prompt)
                sums = waiting.result()
            if put.error is None:
                assert sums == prompt.sums
                break
            assert time.monotonic() - up < 60, put
        print(f"up: the first request arrived after {time.monotonic() - up:.1f} s")
        push(sender, receiver, Prompt.of_chunks(3), parked=True)
        deadline = time.monotonic() + 60
        while receiver.held():
            assert time.monotonic() < deadline, receiver.sidecar.status()
            time.sleep(0.1)


LMCACHE = [("ours", "sync"), ("ours", "async"), ("sync", "ours"), ("async", "ours")]


@pytest.fixture(scope="module")
def lmcache_over_verbs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """LMCache's processes get the system's libibverbs by their environment alone."""
    before = dict(forked.LMCACHE_ENV)
    forked.LMCACHE_ENV.update(RC, **with_systems_libibverbs(tmp_path_factory.mktemp("links")))
    yield
    forked.LMCACHE_ENV.clear()
    forked.LMCACHE_ENV.update(before)


@pytest.mark.usefixtures("lmcache_over_verbs")
@pytest.mark.skipif(not forked.LMCACHE_PYTHON.exists(), reason="no environment with LMCache: make venv-lmcache")
@pytest.mark.parametrize(("sends", "receives"), LMCACHE)
def test_lmcache_as_a_peer(ours: tuple[OurSender, OurReceiver], sends: str, receives: str) -> None:
    sender: Sender = ours[0] if sends == "ours" else LmcacheSender(sends)
    receiver: Receiver = ours[1] if receives == "ours" else LmcacheReceiver(receives)
    try:
        push(sender, receiver, Prompt.of_chunks(17, last=100), parked=False)
        push(sender, receiver, Prompt.of_chunks(200), parked=False)
    finally:
        if sends != "ours":
            sender.stop()
        if receives != "ours":
            receiver.stop()
