"""Every kind of sender to every kind of receiver: {ours, LMCache sync, LMCache async} x {the same}."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from .chunks import Prompt
from .nodes import LmcacheReceiver, LmcacheSender, OurReceiver, OurSender, Receiver, Sender

KINDS = ("ours", "sync", "async")
_requests = itertools.count(1)


@pytest.fixture(scope="module", params=KINDS)
def sender(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sender]:
    made = new_sender(request.param, tmp_path_factory.mktemp("sender"))
    yield made
    made.stop()
    made.notices.close()


@pytest.fixture(scope="module", params=KINDS)
def receiver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    made = new_receiver(request.param, tmp_path_factory.mktemp("receiver"))
    yield made
    made.stop()


def new_sender(kind: str, folder: Path) -> Sender:
    return OurSender(folder) if kind == "ours" else LmcacheSender(kind)


def new_receiver(kind: str, folder: Path) -> Receiver:
    return OurReceiver(folder) if kind == "ours" else LmcacheReceiver(kind)


def move(sender: Sender, receiver: Receiver, prompt: Prompt, batch: int | None = None) -> str:
    """A prompt goes over, and every chunk is what was sent."""
    req = f"r{next(_requests)}"
    put = sender.put(req, receiver.target, prompt, batch)
    assert put.error is None, put
    assert put.written == prompt.chunks
    assert sender.notices.wait(req) is not None, "no word to the proxy"
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
