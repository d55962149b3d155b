"""Tests two tensor-parallel ranks. On LMCache's side each rank has its own process; on the other side both ranks share
one sidecar.

One worker uses the sidecar for both ranks, like an engine with fewer workers than ranks. The worker is the connector's
real worker; tensors take the place of the engine.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from harness.drop_in.chunks import CHUNK_TOKENS, LAYOUT, Prompt, sum_of
from harness.drop_in.nodes import BOUND_S, LmcacheReceiver, LmcacheSender, OurReceiver, OurSender, new_target

from pd_sidecar.kv.layout import Hint, geometry
from pd_sidecar.kv.parts import Parts
from pd_sidecar.options.config import Options
from pd_sidecar.scheduler.metadata import LoadStart, PushStart, PushStep, StepMetadata
from pd_sidecar.scheduler.stats import Stats
from pd_sidecar.worker.ranks import partition
from pd_sidecar.worker.worker import Worker

Peer = TypeVar("Peer", LmcacheSender, LmcacheReceiver)

RANKS = 2
BLOCK, BLOCKS = 32, 160
_requests = itertools.count(1)


class Engine:
    """A worker that has the heads of all ranks, with the tensors of its pages."""

    def __init__(self, socket: Path, *, producer: bool) -> None:
        heads = RANKS * LAYOUT.kv_heads
        shape = (BLOCKS, heads, BLOCK, 2 * LAYOUT.head_size)
        self.tensors = {f"layers.{i}": torch.randn(shape) for i in range(LAYOUT.layers)}
        self.worker = Worker(
            Parts.one(geometry(self.tensors, Hint(BLOCKS, BLOCK, heads, LAYOUT.head_size, mla=False))),
            Options(str(socket), str(socket), LAYOUT.model, CHUNK_TOKENS),
            Stats(),
            engine="test",
            share=partition(ranks=RANKS, workers=1, heads=heads, consumer=not producer).share(0),
            producer=producer,
            consumer=not producer,
        )
        self.until(lambda *_: all(client.connected for client in self.worker.clients))

    def step(self, metadata: StepMetadata) -> tuple[set[str], set[str], set[str]]:
        self.worker.begin(metadata)
        self.worker.computed()
        sent, results = self.worker.finish()
        return sent, results.received, set(results.failed)

    def until(
        self, condition: Callable[[set[str], set[str]], bool], first: StepMetadata | None = None
    ) -> tuple[set[str], set[str]]:
        """Runs steps of the worker until the condition on the sent and received requests holds.

        Returns the received requests, and the received requests that failed.
        """
        sent: set[str] = set()
        received: set[str] = set()
        failed: set[str] = set()
        deadline = time.monotonic() + BOUND_S
        while time.monotonic() < deadline:
            out, came, lost = self.step(first or StepMetadata(idle=True))
            first = None
            sent, received, failed = sent | out, received | came, failed | lost
            if condition(sent, received):
                return received, failed
        raise AssertionError((sent, received, failed))

    def sums(self, prompt: Prompt, table: list[int]) -> list[str]:
        """Returns the hashes of the chunks of one rank, read from the pages."""
        at = torch.arange(prompt.tokens)
        blocks, offsets = torch.tensor(table)[at // BLOCK], at % BLOCK
        heads = slice(prompt.rank * LAYOUT.kv_heads, (prompt.rank + 1) * LAYOUT.kv_heads)
        # `[layer, token, head, K and V]` becomes `[plane, layer, token, head * size]`.
        pages = torch.stack([tensor[blocks, :, offsets][:, heads] for tensor in self.tensors.values()])
        kv = pages.unflatten(3, (2, LAYOUT.head_size)).permute(3, 0, 1, 2, 4).flatten(3)
        parts = [kv[:, :, i * CHUNK_TOKENS : (i + 1) * CHUNK_TOKENS] for i in range(prompt.chunks)]
        return [sum_of(part.contiguous().numpy().tobytes()) for part in parts]


def ranks_of(prompt: Prompt) -> list[Prompt]:
    return [prompt.of_rank(rank, RANKS) for rank in range(RANKS)]


def hashes(prompt: Prompt) -> list[str]:
    return [key.split("@")[3] for key in prompt.keys]


def table_of(prompt: Prompt) -> list[int]:
    """Returns the numbers of the prompt's blocks, in a mixed order."""
    count = -(-prompt.tokens // BLOCK)
    return [(7 * i + 3) % BLOCKS for i in range(count)]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def of_each_rank(make: Callable[[int], Peer]) -> list[Peer]:
    """Starts one LMCache process per rank, all at the same time."""
    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(make, range(RANKS)))


PROMPTS = ((1, 3), (17, 100))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_from_lmcache(stack: ExitStack, tmp_path: Path, mode: str) -> None:
    receiver = OurReceiver(tmp_path, ranks=RANKS)
    stack.callback(receiver.stop)
    for client in receiver.clients:
        client.close()
    engine = Engine(receiver.sidecar.socket, producer=False)
    stack.callback(engine.worker.close)
    senders = of_each_rank(lambda rank: LmcacheSender(mode, rank=rank, ranks=RANKS))
    for sender in senders:
        stack.callback(sender.stop)
        stack.callback(sender.notices.close)
    for chunks, last in PROMPTS:
        prompt = Prompt.of_chunks(chunks, last)
        req = f"ranks-{mode}-{next(_requests)}"
        for sender, part in zip(senders, ranks_of(prompt), strict=True):
            put = sender.put(req, receiver.targets, part)
            assert (put.error, put.written) == (None, part.chunks)
            assert sender.notices.wait(req) is not None
        table = table_of(prompt)
        start = LoadStart(req, req, hashes(prompt), prompt.tokens, 0, prompt.tokens, (table,), table, written=True)
        parked = StepMetadata(load_starts=[start])
        assert engine.until(lambda _, received: bool(received), parked) == ({req}, set())
        engine.step(StepMetadata())  # the step that uses the received KV
        for part in ranks_of(prompt):
            assert engine.sums(part, table) == part.sums
    receiver.sidecar.wait_empty()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_to_lmcache(stack: ExitStack, tmp_path: Path, mode: str) -> None:
    sender = OurSender(tmp_path, ranks=RANKS)
    stack.callback(sender.stop)
    stack.callback(sender.notices.close)
    for client in sender.clients:
        client.close()
    engine = Engine(sender.sidecar.socket, producer=True)
    stack.callback(engine.worker.close)
    targets = [new_target() for _ in range(RANKS)]
    receivers = of_each_rank(lambda rank: LmcacheReceiver(mode, rank=rank, targets=targets))
    for receiver in receivers:
        stack.callback(receiver.stop)
    for chunks, last in PROMPTS:
        prompt = Prompt.of_chunks(chunks, last)
        req, table = f"ranks-{mode}-{next(_requests)}", table_of(prompt)
        init, alloc = tuple(t.init_port for t in targets), tuple(t.alloc_port for t in targets)
        start = PushStart(req, req, targets[0].host, init, alloc, hashes(prompt), prompt.tokens, False)
        step = PushStep(req, (table,), True, prompt.tokens)
        engine.step(StepMetadata(push_starts=[start], push_steps=[step]))
        engine.until(lambda sent, _: bool(sent), StepMetadata(finished=[req]))
        assert sender.notices.wait(req, ranks=RANKS) is not None, "a rank sent no notice to the proxy"
        for receiver, part in zip(receivers, ranks_of(prompt), strict=True):
            assert receiver.get(req, part) == engine.sums(part, table)
    sender.sidecar.wait_empty()
