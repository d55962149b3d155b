"""The prefill worker: gathers computed chunks into granted slots.

Slots may be granted late, a few at a time, or never; a finished request therefore keeps its blocks
until every wanted chunk is staged, the sidecar said that it is over, or `save_deadline_ms` passed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from pd_sidecar.client import Ended, Granted, NotConnectedError
from pd_sidecar.kv import keys
from pd_sidecar.kv.copier import Piece
from pd_sidecar.kv.layout import chunk_span, wanted_chunks
from pd_sidecar.sidecar.wire import Target, WireError
from pd_sidecar.worker.event_slots import EventSlots
from pd_sidecar.worker.push_state import (
    Entry,
    Gather,
    LayeredGather,
    Outgoing,
    take_slots,
    tokens_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pd_sidecar.client import Client
    from pd_sidecar.kv.copier import Copier, Device, Fence, Mark
    from pd_sidecar.scheduler.metadata import PushStart, PushStep, StepMetadata
    from pd_sidecar.scheduler.stats import Stats
    from pd_sidecar.worker.ranks import Rank

logger = init_logger("vllm.pd_sidecar.worker.push")


class Sender:
    """All requests that leave this worker."""

    def __init__(self, rank: Rank, device: Device, client: Client, stats: Stats) -> None:
        self._rank = rank
        self._device = device
        self._client = client
        self._stats = stats
        self._event_slots = EventSlots(len(device.events))
        self._computed: list[Mark] = []
        """Behind all that is computed of `Outgoing.computed`."""
        self._layered: LayeredGather | None = None
        self._below = 0
        """Layers of the step that is being launched, as far as it is."""
        self._is_last = False
        """The engine has launched nothing after it."""
        self._copier: Copier | None = None
        self._by_engine_id: dict[str, Outgoing] = {}
        self._by_req: dict[str, Outgoing] = {}
        self._gathers: list[Gather] = []

    def begin(self, metadata: StepMetadata) -> None:
        """Before the forward: blocks that were taken away are let go of, new work is announced."""
        self._is_last = self._is_last and metadata.idle
        for engine_id in metadata.preempted:
            if outgoing := self._by_engine_id.get(engine_id):
                self._hold(outgoing)
                outgoing.table, outgoing.table_tensor = [], None
                outgoing.computed = outgoing.upto = 0
        for engine_id in metadata.cancelled:
            if outgoing := self._by_engine_id.get(engine_id):
                self._hold(outgoing)
                self._give_up(outgoing, "cancelled")
                outgoing.dropped = True
        for start in metadata.unpushed:
            self._decline(start)
        for start in metadata.push_starts:
            outgoing = Outgoing(start, time.monotonic())
            self._by_engine_id[start.engine_id] = outgoing
            self._by_req[start.req] = outgoing
        for step in metadata.push_steps:
            self._step(step)
        for engine_id in metadata.finished:
            if outgoing := self._by_engine_id.get(engine_id):
                outgoing.held_since = time.monotonic()

    def layers_computed(self, below: int) -> None:
        """Within the forward: so many layers of this step are computed, or will be."""
        if not self._by_engine_id:
            return
        if below <= self._below:
            # A step in several forwards: what was gathered of these layers is not all of it.
            self._end_layered()
            self._below = self._rank.layers
            return
        self._below = below
        if self._layered is None:
            self._layered = self._start_layered()
        self._gather_below(below)

    def computed(self) -> None:
        """After the forward: what was to be computed in this step is computed, or will be."""
        self._below = 0
        if self._gather_below(self._rank.layers) and (layered := self._layered) is not None:
            self._layered = None
            fence, signal = layered.layered_copy.fence, layered.ranges[-1][1]
            self._stats.add("layered_tokens", tokens_of(layered.entries))
            self._launched(fence, layered.entries, signal, layered.ranges)
            for outgoing in layered.outgoings:
                outgoing.gathering -= 1
        if not self._by_engine_id:
            return
        self._computed = [self._device.mark()]
        self._is_last = True
        for outgoing in self._by_engine_id.values():
            outgoing.computed = outgoing.upto

    def connected(self, copier: Copier) -> None:
        """There is a buffer, another one than before."""
        self._copier = copier

    def lost(self) -> None:
        """The sidecar is gone, and every slot with it."""
        self._end_layered()
        self._copier = None
        self._event_slots.reset()
        for outgoing in list(self._by_engine_id.values()):
            self._fail(outgoing, "sidecar_lost")

    def granted(self, message: Granted) -> None:
        """Some chunks have slots now."""
        outgoing = self._by_req.get(message.req)
        if outgoing is None or outgoing.over:
            return  # crossed with our Cancel
        outgoing.have_tokens = message.have_tokens
        outgoing.by_layers |= message.layers
        outgoing.slots.update(zip(message.chunks, message.slots, strict=True))

    def ended(self, message: Ended) -> None:
        """The sidecar wants no more of a request."""
        outgoing = self._by_req.get(message.req)
        if self._layered is not None and outgoing in self._layered.outgoings:
            # Before its events are taken for others.
            self._end_layered()
        self._event_slots.ended(message.req)
        if outgoing is None:
            return
        if message.reason is not None:
            self._fail(outgoing, message.reason)
        elif not self._is_staged(outgoing):
            outgoing.over = True  # the other side wants nothing of it

    def move(self) -> bool:
        """Gathers what has both a slot and its tokens. Says whether there was anything."""
        complete = self._complete(lambda outgoing: outgoing.computed)
        if self._copier is not None:
            size = len(complete) or 1
            if self._device.is_asynchronous:
                size = max(1, GATHER_TOKENS // self._rank.chunk_tokens)
            for at in range(0, len(complete), size):
                self._gather(self._copier, complete[at : at + size])
        self._settle()
        return bool(complete)

    def finished(self) -> set[str]:
        """Requests whose blocks may be freed; each is named once."""
        now = time.monotonic()
        out: set[str] = set()
        for engine_id, outgoing in list(self._by_engine_id.items()):
            since = outgoing.held_since
            if since is not None and now > since + self._rank.save_deadline_s:
                self._give_up(outgoing, "save_deadline")
            if not outgoing.over or outgoing.gathering:
                continue
            if outgoing.owes_cancel:
                self._tell_cancel(outgoing)
            if outgoing.dropped or since is not None:
                self._forget(outgoing)
            if since is not None:
                out.add(engine_id)
        return out

    @property
    def is_waiting(self) -> bool:
        """A word of the sidecar, or the end of a gather, would be of use."""
        # Looked at without the lock: a copy, which the other thread cannot change meanwhile.
        return any(not o.over or o.gathering for o in list(self._by_engine_id.values()))

    @property
    def has_part_in_steps(self) -> bool:
        """What is computed next may be wanted elsewhere."""
        return bool(self._by_engine_id)

    @property
    def is_moving(self) -> bool:
        """A gather is under way that the sidecar does not know of."""
        return any(not gather.signalled for gather in self._gathers)

    def _step(self, step: PushStep) -> None:
        outgoing = self._by_engine_id.get(step.engine_id)
        if outgoing is None:
            return
        outgoing.table = step.blocks if step.replace else outgoing.table + step.blocks
        outgoing.table_tensor = None
        if step.replace:
            # Computed tokens of the new table (a prefix hit) count from the end of this step on.
            outgoing.computed = 0
        outgoing.upto = step.upto
        if outgoing.over or step.upto <= outgoing.announced:
            return
        try:
            if outgoing.announced:
                self._client.computing(outgoing.start.req, step.upto)
            else:
                self._reserve(outgoing, step.upto)
        except NotConnectedError:
            self._fail(outgoing, "no_sidecar")
        except WireError:
            self._fail(outgoing, "too_large")
        outgoing.announced = step.upto

    def _decline(self, start: PushStart) -> None:
        """Nothing of a request is moved: the proxy gets a word for each of its ports."""
        ports = list(zip(start.init_ports, start.alloc_ports, strict=True))
        for init_port, alloc_port in ports[self._rank.index :: self._rank.world_size]:
            target = Target(start.host, init_port, alloc_port)
            try:
                self._client.reserve(start.req, target, [], tokens=start.tokens, upto=0)
            except NotConnectedError:
                return  # no sidecar, no word

    def _reserve(self, outgoing: Outgoing, upto: int) -> None:
        start, rank = outgoing.start, self._rank
        target = Target(start.host, start.init_ports[rank.index], start.alloc_ports[rank.index])
        self._client.reserve(
            start.req,
            target,
            keys.keys(rank.model, rank.world_size, rank.index, start.hashes, rank.dtype),
            tokens=start.tokens,
            upto=upto,
            overlap=start.overlap,
        )

    def _gather(self, copier: Copier, entries: list[Entry]) -> None:
        take_slots(entries)
        signal = self._event_slots.take({entry.outgoing.start.req for entry in entries})
        pieces = [entry.piece for entry in entries]
        fence = copier.gather(pieces, self._computed, signal, last=self._is_last)
        self._launched(fence, entries, signal)

    def _launched(
        self,
        fence: Fence,
        entries: list[Entry],
        signal: int | None,
        layers: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Tells the sidecar of a gather whose end it can wait for by itself."""
        chunks: dict[str, list[Entry]] = {}
        for entry in entries:
            chunks.setdefault(entry.outgoing.start.engine_id, []).append(entry)
        for own in chunks.values():
            outgoing = own[0].outgoing
            outgoing.gathering += 1
            numbers = [entry.chunk for entry in own]
            gather = Gather(fence, outgoing, numbers, signal is not None)
            self._gathers.append(gather)
            if gather.signalled:
                self._tell_staged(gather, 0.0, signal, layers)

    def _start_layered(self) -> LayeredGather | None:
        """What this step completes of requests that are gathered by layers, if there is any."""
        always = self._rank.by_layers
        entries = [
            entry
            for entry in self._complete(lambda outgoing: outgoing.upto)
            if (always or entry.outgoing.by_layers)
            # What was complete before need not wait for this step's last layers.
            and entry.piece.tokens[1] > entry.outgoing.computed
        ]
        if self._copier is None or not entries or self._event_slots.free < SPARE_EVENTS:
            return None
        layered_copy = self._copier.layered_copy([entry.piece for entry in entries])
        if layered_copy is None:
            return None
        take_slots(entries)
        layered = LayeredGather(entries, layered_copy)
        for outgoing in layered.outgoings:
            outgoing.gathering += 1
        return layered

    def _gather_below(self, below: int) -> bool:
        """Goes on with what is gathered by layers. Says whether there is any."""
        if (layered := self._layered) is None:
            return False
        requests = layered.outgoings
        signal = None
        if not any(outgoing.over for outgoing in requests):
            signal = self._event_slots.take({outgoing.start.req for outgoing in requests})
        if signal is None:
            self._end_layered()
            return False
        layered.layered_copy.gather(below, signal)
        layered.ranges.append((below, signal))
        return True

    def _end_layered(self) -> None:
        """Chunks of which the sidecar was told nothing are gathered as a whole after the step."""
        if (layered := self._layered) is None:
            return
        self._layered = None
        if layered.ranges:
            # Its ranges are on their way all the same.
            fence = layered.layered_copy.fence
            self._gathers += [Gather(fence, outgoing, [], True) for outgoing in layered.outgoings]
        else:
            for outgoing in layered.outgoings:
                outgoing.gathering -= 1
        self._event_slots.put_back(signal for _, signal in layered.ranges)
        for entry in layered.entries:
            if not entry.outgoing.over:
                entry.outgoing.slots[entry.chunk] = entry.piece.slot

    def _complete(self, upto: Callable[[Outgoing], int]) -> list[Entry]:
        """The chunks that have a slot, of so many tokens of each request."""
        complete = []
        for outgoing in self._by_engine_id.values():
            if outgoing.over or outgoing.have_tokens is None:
                continue
            for chunk, slot in outgoing.slots.items():
                span = chunk_span(chunk, outgoing.start.tokens, outgoing.have_tokens, self._rank.chunk_tokens)
                if span[1] > upto(outgoing):
                    continue
                if outgoing.table_tensor is None:
                    outgoing.table_tensor = torch.tensor(outgoing.table, dtype=torch.int64)
                piece = Piece(slot, outgoing.table_tensor, span, span)
                complete.append(Entry(outgoing, chunk, piece))
        return complete

    def _settle(self) -> None:
        """Tells the sidecar of gathers that are over, unless it knew before."""
        under_way: list[Gather] = []
        for gather in self._gathers:
            if not gather.fence.done():
                under_way.append(gather)
                continue
            outgoing = gather.outgoing
            outgoing.gathering -= 1
            seconds = gather.fence.seconds
            outgoing.gather_seconds += seconds
            if not (outgoing.over or gather.signalled):
                self._tell_staged(gather, seconds, None)
        self._gathers = under_way
        for outgoing in self._by_engine_id.values():
            if not outgoing.over and not outgoing.gathering and self._is_staged(outgoing):
                self._succeed(outgoing)

    def _tell_staged(
        self,
        gather: Gather,
        seconds: float,
        signal: int | None,
        layers: Sequence[tuple[int, int]] = (),
    ) -> None:
        outgoing = gather.outgoing
        outgoing.staged.update(gather.chunks)
        try:
            self._client.staged(
                outgoing.start.req,
                gather.chunks,
                round(seconds * 1e6),
                event=signal,
                layers=layers,
            )
        except NotConnectedError:
            self._fail(outgoing, "sidecar_lost")

    def _hold(self, outgoing: Outgoing) -> None:
        """The request's blocks belong to others from now on: those come after its gathers."""
        for gather in self._gathers:
            if gather.outgoing is outgoing:
                self._device.hold(gather.fence)

    def _wanted(self, outgoing: Outgoing) -> range:
        return wanted_chunks(outgoing.start.tokens, outgoing.have_tokens or 0, self._rank.chunk_tokens)

    def _is_staged(self, outgoing: Outgoing) -> bool:
        return outgoing.have_tokens is not None and outgoing.staged.issuperset(self._wanted(outgoing))

    def _succeed(self, outgoing: Outgoing) -> None:
        outgoing.over = True
        tokens = outgoing.start.tokens - (outgoing.have_tokens or 0)
        size, seconds = tokens * self._rank.token_bytes, outgoing.gather_seconds
        self._stats.add("saves")
        self._stats.add("save_tokens", tokens)
        self._stats.add("save_bytes", size)
        self._stats.add("gather_seconds", seconds)
        took = time.monotonic() - outgoing.began
        # Its beginning is what people of LMCache look for, and what they have scripts for.
        logger.info(
            "[req_id=%s] Stored %d out of total %d tokens. size: %.4f GB, cost %.4f ms, "
            "throughput: %.4f GB/s; parts: %d chunks, gather %.4f ms (%.1f GB/s)",
            outgoing.start.req,
            tokens,
            outgoing.start.tokens,
            size / 1e9,
            took * 1e3,
            size / 1e9 / took if took else 0.0,
            len(outgoing.staged),
            seconds * 1e3,
            size / 1e9 / seconds if seconds else 0.0,
        )

    def _give_up(self, outgoing: Outgoing, reason: str) -> None:
        """Ends a request from this side. The sidecar is told when no gather is under way."""
        if not outgoing.over:
            self._fail(outgoing, reason)
            outgoing.owes_cancel = True

    def _tell_cancel(self, outgoing: Outgoing) -> None:
        outgoing.owes_cancel = False
        try:
            self._client.cancel(outgoing.start.req)
        except NotConnectedError:
            return  # its end of stream says the same

    def _fail(self, outgoing: Outgoing, reason: str) -> None:
        if outgoing.over:
            return
        outgoing.over = True
        outgoing.slots.clear()
        self._stats.add_reason("save_failures", reason)
        logger.info(
            "%s: not handed over (%s) after %d chunks",
            outgoing.start.req,
            reason,
            len(outgoing.staged),
        )

    def _forget(self, outgoing: Outgoing) -> None:
        self._by_engine_id.pop(outgoing.start.engine_id, None)
        if self._by_req.get(outgoing.start.req) is outgoing:
            del self._by_req[outgoing.start.req]


SPARE_EVENTS = 16
"""A step is gathered by layers only while there are so many events: it takes up to six, and has to
be gathered once more if it runs out of them."""
GATHER_TOKENS = 2048
"""Of one gather that goes on after its launch: while the next part is gathered this one is pushed,
and scattered. 256 MiB of an 8B model: with less the wire would not reach its speed."""
