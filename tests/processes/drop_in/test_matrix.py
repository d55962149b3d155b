"""Tests a sidecar as sender and as receiver, with a sidecar, LMCache sync and LMCache async on the other side.

This file has no pairs with LMCache on both sides, because no sidecar takes part in them. `test_proxy` tests such pairs
behind pd-proxy.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.drop_in.chunks import Prompt
from harness.drop_in.nodes import LmcacheReceiver, LmcacheSender, OurReceiver, OurSender, Receiver, Sender
from harness.process import ProcessFailed

PAIRS = [("ours", "ours"), ("ours", "sync"), ("ours", "async"), ("sync", "ours"), ("async", "ours")]
_requests = itertools.count(1)

pytestmark = pytest.mark.parametrize(("sender", "receiver"), PAIRS, indirect=True, scope="module")


@pytest.fixture(scope="module")
def sender(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sender]:
    made = new_sender(request.param, tmp_path_factory.mktemp("sender"))
    yield made
    made.stop()
    made.notices.close()


@pytest.fixture(scope="module")
def receiver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    made = new_receiver(request.param, tmp_path_factory.mktemp("receiver"))
    yield made
    made.stop()


def new_sender(kind: str, folder: Path) -> Sender:
    return OurSender(folder) if kind == "ours" else LmcacheSender(kind)


def new_receiver(kind: str, folder: Path) -> Receiver:
    return OurReceiver(folder) if kind == "ours" else LmcacheReceiver(kind)


def move(sender: Sender, receiver: Receiver, prompt: Prompt, batch: int | None = None) -> str:
    """Moves a prompt and asserts that each chunk arrives unchanged. Returns the id of the request."""
    req = f"r{next(_requests)}"
    put = sender.put(req, receiver.target, prompt, batch)
    assert put.error is None, put
    assert put.written == prompt.chunks
    assert sender.notices.wait(req) is not None, "no notice to the proxy"
    assert receiver.get(req, prompt) == prompt.sums
    return req


@pytest.mark.parametrize("chunks", [1, 17, 200])
def test_every_chunk_arrives(sender: Sender, receiver: Receiver, chunks: int) -> None:
    move(sender, receiver, Prompt.of_chunks(chunks))
    move(sender, receiver, Prompt.of_chunks(chunks, last=100))


def test_a_prompt_of_several_steps(sender: Sender, receiver: Receiver) -> None:
    move(sender, receiver, Prompt.of_chunks(17, last=3), batch=5)


def test_the_same_keys_again_with_other_content(sender: Sender, receiver: Receiver) -> None:
    first = Prompt.of_chunks(5)
    for seed in (first.seed, first.seed + 1000):
        move(sender, receiver, Prompt(first.name, first.tokens, seed))


def test_the_same_prompt_again_before_it_is_read(sender: Sender, receiver: Receiver) -> None:
    """Sends one prompt twice. LMCache's receiver reports that it has the keys already; a sidecar gives new slots."""
    prompt = Prompt.of_chunks(5, last=9)
    requests = [f"r{next(_requests)}" for _ in range(2)]
    for req in requests:
        put = sender.put(req, receiver.target, prompt)
        assert (put.written, put.error) == (prompt.chunks, None), put
        assert sender.notices.wait(req) is not None, "no notice to the proxy"
    for req in requests if isinstance(receiver, OurReceiver) else requests[:1]:
        assert receiver.get(req, prompt) == prompt.sums


def test_no_chunks(sender: Sender, receiver: Receiver) -> None:
    """Sends a prompt without chunks. A sidecar reserves no slots and reports success at once.

    LMCache's cache engine never passes such a request to a backend. A backend that gets a request without chunks raises
    an IndexError or does nothing, and sends no notice.
    """
    nothing, req = Prompt.of_chunks(0), f"r{next(_requests)}"
    if isinstance(sender, OurSender):
        put = sender.put(req, receiver.target, nothing)
        assert (put.written, put.error) == (0, None)
        notice = sender.notices.wait(req)
        assert notice is not None
        assert notice["x"]["ok"] is True
    else:
        with contextlib.suppress(ProcessFailed):
            assert sender.put(req, receiver.target, nothing).written == 0
        assert sender.notices.wait(req, 1) is None
    assert receiver.held() == 0
    move(sender, receiver, Prompt.of_chunks(2))


def test_either_side_starts_again(sender: Sender, receiver: Receiver) -> None:
    """Restarts each side at its old address. The new process has no state of the old process."""
    move(sender, receiver, Prompt.of_chunks(3))
    sender.restart()
    move(sender, receiver, Prompt.of_chunks(17, last=100))
    # An LMCache sender makes only one handshake in its life, so it must restart together with its receiver.
    parts: list[Sender | Receiver] = [receiver, sender] if isinstance(sender, LmcacheSender) else [receiver]
    with ThreadPoolExecutor() as pool:
        for start in [pool.submit(part.restart) for part in parts]:
            start.result()
    move(sender, receiver, Prompt.of_chunks(17, last=100))
