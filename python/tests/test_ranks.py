"""Tests KV that is split into ranks: each rank has its worker, and every head arrives at its place."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from fake_sidecar import RankedSidecar
from test_connector import cache, config
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from pd_sidecar.connector import PdSidecarConnector
from pd_sidecar.kv.layout import Hint, geometry
from pd_sidecar.kv.parts import Parts
from pd_sidecar.options.config import ConfigError, Options
from pd_sidecar.scheduler.metadata import LoadStart, PushStart, PushStep, StepMetadata
from pd_sidecar.scheduler.stats import Stats
from pd_sidecar.sidecar import wire
from pd_sidecar.worker.ranks import Part, RankCounter, Share, partition
from pd_sidecar.worker.worker import Worker

LAYERS, SIZE, BLOCK, BLOCKS, CHUNK = 2, 8, 16, 12, 32
TOKENS, HASHES, TABLE = 50, ["a", "b"], [7, 2, 9, 4]


@pytest.mark.parametrize(
    ("ranks", "workers", "heads", "shares"),
    [
        (1, 1, 8, [[(0, None)]]),
        (2, 2, 2, [[(0, None)], [(1, None)]]),
        # Fewer workers than ranks: each worker has several ranks, and each rank has a part of the worker's heads.
        (2, 1, 2, [[(0, range(1)), (1, range(1, 2))]]),
        (4, 1, 8, [[(r, range(2 * r, 2 * r + 2)) for r in range(4)]]),
        (4, 2, 8, [[(0, range(2)), (1, range(2, 4))], [(2, range(2)), (3, range(2, 4))]]),
        # More ranks than heads: several ranks have the same head, because vLLM gives the head to several workers.
        (4, 1, 2, [[(0, range(1)), (1, range(1)), (2, range(1, 2)), (3, range(1, 2))]]),
        (4, 2, 2, [[(0, range(1)), (1, range(1))], [(2, range(1)), (3, range(1))]]),
        # MLA, where every worker holds all KV.
        (2, 1, 1, [[(0, range(1)), (1, range(1))]]),
        (1, 2, 1, [[(0, None)], []]),
        (2, 4, 1, [[(0, None)], [], [(1, None)], []]),
        (2, 4, 2, [[(0, None)], [], [(1, None)], []]),
    ],
)
def test_shares(ranks, workers, heads, shares):
    made = partition(ranks=ranks, workers=workers, heads=heads, consumer=False)
    expect = [Share(ranks, tuple(Part(r, h) for r, h in share)) for share in shares]
    assert [made.share(worker) for worker in range(workers)] == expect


@pytest.mark.parametrize(
    ("ranks", "workers", "heads", "consumer", "why"),
    [
        (3, 2, 6, False, "multiple"),
        (0, 2, 6, False, "multiple"),
        (4, 1, 6, False, "divide the number of heads"),
        (2, 4, 8, False, "no worker has all heads"),
        (1, 2, 2, False, "no worker has all heads"),
        (1, 2, 1, True, "every worker"),
    ],
)
def test_what_cannot_be_cut(ranks, workers, heads, consumer, why):
    with pytest.raises(ValueError, match=why) as error:
        partition(ranks=ranks, workers=workers, heads=heads, consumer=consumer)
    assert f"ranks={ranks} with tensor-parallel size {workers}" in str(error.value)


@pytest.mark.parametrize("role", list(KVConnectorRole))
def test_an_engine_that_cannot_be_cut_so_does_not_start(role):
    wrong = config({"ranks": 3}, tensor_parallel_size=2)
    wrong.model_config.use_mla = False
    wrong.model_config.get_total_num_kv_heads = lambda: 6
    with pytest.raises(ConfigError, match="ranks=3 with tensor-parallel size 2 and 6 KV heads"):
        PdSidecarConnector(wrong, role, cache())
    with pytest.raises(ConfigError, match="ranks=-1"):
        PdSidecarConnector(config({"ranks": -1}), role, cache())


def test_a_request_counts_when_all_ranks_have_named_it():
    counter = RankCounter()
    assert counter.of_all({"a", "b"}, 2) == set()
    assert counter.of_all({"b"}, 2) == {"b"}
    assert counter.of_all({"b", "a"}, 2) == {"a"}
    assert counter.of_all({"b"}, 2) == {"b"}
    assert counter.of_all({"c"}, 1) == {"c"}


class Engine:
    """The workers of one engine, with one sidecar."""

    def __init__(self, path, heads, workers, ranks, *, producer, mla=False):
        own = max(1, heads // workers)
        # `[worker][layer]`, as vLLM 0.32 lays them out.
        self.tensors = [
            {f"layers.{i}": torch.randn(BLOCKS, own, BLOCK, 2 * SIZE) for i in range(LAYERS)} for _ in range(workers)
        ]
        if mla and producer:
            self.tensors = self.tensors[:1] * workers
        hint = Hint(BLOCKS, BLOCK, own, 2 * SIZE if mla else SIZE, mla)
        self.sidecar = RankedSidecar(path)
        socket = str(path)
        options = Options(sender_socket=socket, receiver_socket=socket, model_name="m", chunk_size=CHUNK)
        shares = partition(ranks=ranks, workers=workers, heads=heads, consumer=not producer)
        self.workers = [
            Worker(
                Parts.one(geometry(tensors, hint)),
                options,
                Stats(),
                engine="test",
                share=shares.share(index),
                producer=producer,
                consumer=not producer,
            )
            for index, tensors in enumerate(self.tensors)
        ]
        self.until(lambda: all(c.connected for worker in self.workers for c in worker.clients))

    def step(self, **more):
        """Runs one step of every worker, and returns each worker's report."""
        reports = []
        for worker in self.workers:
            worker.begin(StepMetadata(idle=not more, **more))
            worker.computed()
            sent, results = worker.finish()
            reports.append((sent, results.received, results.failed))
        return reports

    def until(self, condition):
        """Runs steps until the condition holds, and returns all that each worker has reported."""
        total = [([], [], {}) for _ in self.workers]
        deadline = time.monotonic() + 60
        while True:
            # Test the condition before the step: the thread may make it true, and only a later step reports the result.
            holds = condition()
            for (sent, received, failed), (s, r, f) in zip(total, self.step(), strict=True):
                sent.extend(s)
                received.extend(r)
                failed.update(f)
            if holds:
                return total
            assert time.monotonic() < deadline

    def kv(self):
        """Returns the KV of the whole model in the blocks of the table, as `[2, layers, tokens, heads, size]`."""
        at = torch.arange(TOKENS)
        blocks, offsets = torch.tensor(TABLE)[at // BLOCK], at % BLOCK
        heads = [torch.stack([tensor[blocks, :, offsets] for tensor in tensors.values()]) for tensors in self.tensors]
        return torch.cat(heads, 2).unflatten(3, (2, SIZE)).permute(3, 0, 1, 2, 4)

    def close(self):
        for worker in self.workers:
            worker.close()


PUSH = PushStart("a", "r", "h", (7300, 7301), (7400, 7401), HASHES, TOKENS, True)
LOAD = LoadStart("a", "r", HASHES, TOKENS, 0, TOKENS, (TABLE,), TABLE)


@pytest.fixture
def engines():
    made = []
    yield made
    for engine in made:
        engine.close()


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 1), (2, 2), (1, 1)])
def test_every_head_arrives(tmp_path, engines, prefill, decode):
    """Moves two ranks between engines of any size. Each head must arrive in the same place."""
    p = Engine(tmp_path / "p.sock", 4, prefill, 2, producer=True)
    d = Engine(tmp_path / "d.sock", 4, decode, 2, producer=False)
    engines += [p, d]
    assert not torch.equal(p.kv(), d.kv())
    p.step(push_starts=[PUSH], push_steps=[PushStep("a", (TABLE,), True, TOKENS)])
    d.step(load_starts=[LOAD])
    for rank, sender in sorted(p.sidecar.ranks.items()):
        asked = sender.next(wire.Reserve)
        assert asked.to == wire.Target("h", 7300 + rank, 7400 + rank)
        assert asked.keys == [f"m@2@{rank}@{h}@float" for h in HASHES]
        assert d.sidecar.ranks[rank].next(wire.Await).keys == asked.keys
        hello, there = sender.hellos[0], d.sidecar.ranks[rank].hellos[0]
        assert (hello.rank, hello.world_size, hello.layout) == (rank, 2, there.layout)
        assert hello.layout.kv_heads == 2
        # Use different slots on the two sides, and for the two ranks.
        sender.say(wire.Granted("r", 0, [0, 1], [4 + rank, 1]))
    p.until(lambda: all(not sender.nothing() for sender in p.sidecar.ranks.values()))
    for rank, sender in p.sidecar.ranks.items():
        assert sender.next(wire.Staged).chunks == [0, 1]
        receiver = d.sidecar.ranks[rank]
        for chunk, (there, here) in enumerate([(4 + rank, 2), (1, 5)]):
            receiver.write(here, sender.read(there, sender.slot_bytes))
            receiver.say(wire.Ready("r", 0, [chunk], [here]))
    reports = d.until(lambda: not any(r._by_req for w in d.workers for r in w._receivers))
    assert torch.equal(d.kv(), p.kv())
    assert all(receiver.next(wire.Release) for receiver in d.sidecar.ranks.values())
    for _ in range(100):
        for total, (_, received, failed) in zip(reports, d.step(), strict=True):
            total[1].extend(received)
            total[2].update(failed)
    assert [(received, failed) for _, received, failed in reports] == [(["a"], {})] * decode
    assert [sent for sent, _, _ in p.step(finished=["a"])] == [{"a"}] * prefill


@pytest.mark.parametrize(("prefill", "decode", "ranks"), [(2, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_what_all_workers_hold_is_sent_once_a_rank(tmp_path, engines, prefill, decode, ranks):
    p = Engine(tmp_path / "p.sock", 1, prefill, ranks, producer=True, mla=True)
    d = Engine(tmp_path / "d.sock", 1, decode, ranks, producer=False, mla=True)
    engines += [p, d]
    start = replace(PUSH, init_ports=PUSH.init_ports[:ranks], alloc_ports=PUSH.alloc_ports[:ranks])
    p.step(push_starts=[start], push_steps=[PushStep("a", (TABLE,), True, TOKENS)])
    d.step(load_starts=[LOAD])
    assert sorted(p.sidecar.ranks) == sorted(d.sidecar.ranks) == list(range(ranks))
    for rank, sender in p.sidecar.ranks.items():
        assert sender.next(wire.Reserve).keys == d.sidecar.ranks[rank].next(wire.Await).keys
        sender.say(wire.Granted("r", 0, [0, 1], [3, 2]))
    p.until(lambda: all(not sender.nothing() for sender in p.sidecar.ranks.values()))
    for rank, sender in p.sidecar.ranks.items():
        receiver = d.sidecar.ranks[rank]
        for slot in (3, 2):
            receiver.write(slot, sender.read(slot, sender.slot_bytes))
        receiver.say(wire.Ready("r", 0, [0, 1], [3, 2]))
    d.until(lambda: all(not r.nothing() for r in d.sidecar.ranks.values()))
    # Each decode worker must have all KV.
    whole = p.kv()[:, :, :, :1]
    assert torch.equal(d.kv(), whole.expand(-1, -1, -1, decode, -1))
    assert [sent for sent, _, _ in p.step(finished=["a"])] == [{"a"}] * prefill


def test_one_rank_alone_frees_and_resumes_nothing(tmp_path, engines):
    p = Engine(tmp_path / "p.sock", 4, 1, 2, producer=True)
    d = Engine(tmp_path / "d.sock", 4, 1, 2, producer=False)
    engines += [p, d]
    p.step(push_starts=[PUSH], push_steps=[PushStep("a", (TABLE,), True, TOKENS)])
    p.sidecar.ranks[0].next(wire.Reserve)
    p.sidecar.ranks[0].say(wire.Granted("r", 0, [0, 1], [0, 1]))
    p.until(lambda: not p.sidecar.ranks[0].nothing())
    p.sidecar.ranks[0].next(wire.Staged)
    assert [sent for sent, _, _ in [*p.step(finished=["a"]), *p.step()]] == [set(), set()]
    p.sidecar.ranks[1].say(wire.Ended("r", "no_room", 0))
    gone, deadline = [], time.monotonic() + 60
    while not gone:
        assert time.monotonic() < deadline
        gone = [sent for sent, _, _ in p.step() if sent]
    assert gone == [{"a"}]

    # Only one rank's KV arrives. The request must be reported once, as failed.
    d.step(load_starts=[LOAD])
    d.sidecar.ranks[0].next(wire.Await)
    d.sidecar.ranks[0].say(wire.Ready("r", 0, [0, 1], [0, 1]))
    assert d.until(lambda: not d.sidecar.ranks[0].nothing()) == [([], [], {})]
    d.sidecar.ranks[0].next(wire.Release)
    d.sidecar.ranks[1].say(wire.Ended("r", "no_sender", 0))
    failed, deadline = [], time.monotonic() + 60
    while not failed:
        assert time.monotonic() < deadline
        failed = [(received, failed) for _, received, failed in d.step() if received]
    assert failed == [({"a"}, {"a": TABLE})]


def test_a_worker_whose_heads_another_sends_has_nothing_to_wait_for(tmp_path, engines):
    p = Engine(tmp_path / "p.sock", 2, 2, 2, producer=True)
    engines.append(p)
    spare = Worker(
        Parts.one(geometry(p.tensors[1], Hint(BLOCKS, BLOCK, 1, SIZE, False))),
        Options(sender_socket=str(tmp_path / "p.sock"), model_name="m", chunk_size=CHUNK),
        Stats(),
        engine="test",
        share=partition(ranks=1, workers=2, heads=1, consumer=False).share(1),
        producer=True,
        consumer=False,
    )
    spare.begin(StepMetadata(push_starts=[PUSH], push_steps=[PushStep("a", (TABLE,), True, TOKENS)]))
    spare.computed()
    assert spare.finish()[0] == set()
    spare.begin(StepMetadata(finished=["a"]))
    assert spare.finish()[0] == {"a"}
    spare.begin(StepMetadata(idle=True))
    assert spare.finish()[0] == set()
    spare.close()
