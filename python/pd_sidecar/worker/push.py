"""Gathers the chunks that a prefill worker has computed into the slots that the sidecar granted.

A grant may come late, for a few chunks at a time, or never. A finished request therefore keeps its blocks until one of
three things happens: every wanted chunk is staged, the sidecar has sent `Ended`, or `save_deadline_ms` has passed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from pd_sidecar.client import Ended, Granted, NotConnectedError
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
    """Pushes all requests of one rank of this worker."""

    def __init__(self, rank: Rank, device: Device, client: Client, stats: Stats) -> None:
        self._rank = rank
        self._device = device
        self._client = client
        self._stats = stats
        self._event_slots = EventSlots(len(device.events))
        self._computed: list[Mark] = []
        """The mark after the forward that computed the tokens of `Outgoing.computed`."""
        self._layered: LayeredGather | None = None
        self._below = 0
        """The number of layers of the current step that the engine has launched so far."""
        self._is_last = False
        """True while the engine has launched no work after the mark in `_computed`."""
        self._copier: Copier | None = None
        self._by_engine_id: dict[str, Outgoing] = {}
        self._by_req: dict[str, Outgoing] = {}
        self._gathers: list[Gather] = []
        self.kept: set[str] = set()
        """The kept requests that have not ended at the sidecar. A decode side may still fetch their KV, or the sidecar
        still sends it.
        """

    def begin(self, metadata: StepMetadata) -> None:
        """Runs before the forward: handles requests whose blocks the scheduler took away, and announces new work."""
        self._is_last = self._is_last and metadata.idle
        for engine_id in metadata.preempted:
            if outgoing := self._by_engine_id.get(engine_id):
                self._hold(outgoing)
                outgoing.tables, outgoing.tensors = (), {}
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
                self._restart_keep(outgoing)

    def layers_computed(self, below: int) -> None:
        """Runs within the forward, when the engine has launched the first `below` layers."""
        if not self._by_engine_id:
            return
        if below <= self._below:
            # The engine runs this step in several forwards. The layers gathered so far hold only the first forward's
            # tokens.
            self._end_layered()
            self._below = self._rank.layers
            return
        self._below = below
        if self._layered is None:
            self._layered = self._start_layered()
        self._gather_below(below)

    def computed(self) -> None:
        """Runs after the forward, when the engine has launched the whole step."""
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
        """Takes the copier for a new connection, which has a new buffer."""
        self._copier = copier

    def lost(self) -> None:
        """Fails all requests after the connection has ended: their slots are gone."""
        self._end_layered()
        self._copier = None
        self.kept.clear()
        self._event_slots.reset()
        for outgoing in list(self._by_engine_id.values()):
            self._fail(outgoing, "sidecar_lost")

    def granted(self, message: Granted) -> None:
        """Stores the slots that the sidecar granted for a request."""
        outgoing = self._by_req.get(message.req)
        if outgoing is None or outgoing.over:
            return  # The sidecar sent the grant before it read our `Cancel`.
        if outgoing.plan is None or outgoing.have_tokens != message.have_tokens:
            outgoing.have_tokens = message.have_tokens
            outgoing.plan = self._rank.plan(outgoing.start.tokens, message.have_tokens)
            outgoing.wanted = frozenset(outgoing.plan.wanted())
        outgoing.by_layers |= message.layers
        outgoing.slots.update(zip(message.chunks, message.slots, strict=True))

    def ended(self, message: Ended) -> None:
        """Ends a request after the sidecar's last message about it."""
        self.kept.discard(message.req)
        outgoing = self._by_req.get(message.req)
        if self._layered is not None and outgoing in self._layered.outgoings:
            # First end the request's layered gather: the next call frees the gather's events, and another request may
            # then use them.
            self._end_layered()
        self._event_slots.ended(message.req)
        if outgoing is None:
            return
        if message.reason is not None:
            self._fail(outgoing, message.reason)
        elif not self._is_staged(outgoing):
            outgoing.over = True  # the receiver wants none of the chunks

    def move(self) -> bool:
        """Gathers each chunk that has a slot and all its tokens. Returns true if there were any."""
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
        """Returns the requests whose blocks may be freed. Returns each request once."""
        now = time.monotonic()
        out: set[str] = set()
        for engine_id, outgoing in list(self._by_engine_id.items()):
            since = outgoing.held_since
            # This deadline is not for kept KV: the sidecar limits the time for which KV is kept.
            if since is not None and not outgoing.start.token and now > since + self._rank.save_deadline_s:
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
        """True while a request waits for a message of the sidecar or for the end of a gather."""
        # Loop over a copy, because this code runs without the lock: the other thread may add or remove a request during
        # the loop.
        return any(not o.over or o.gathering for o in list(self._by_engine_id.values()))

    @property
    def has_part_in_steps(self) -> bool:
        """True if the next step may compute tokens that this rank pushes."""
        return bool(self._by_engine_id)

    @property
    def is_moving(self) -> bool:
        """True while a gather is under way and the sidecar does not wait for its event."""
        return any(not gather.signalled for gather in self._gathers)

    def _step(self, step: PushStep) -> None:
        outgoing = self._by_engine_id.get(step.engine_id)
        if outgoing is None:
            return
        if step.replace or step.is_whole or not outgoing.tables:
            outgoing.tables = step.tables
        elif step.tables:
            pairs = zip(outgoing.tables, step.tables, strict=True)
            outgoing.tables = tuple(known + more for known, more in pairs)
        outgoing.tensors = {}
        if step.replace:
            # A new table may start with a prefix hit. The tokens of the hit count as computed only when this step is
            # over.
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
        """Tells the sidecar to send the proxy a notification for each port, although nothing is pushed."""
        ports = list(zip(start.init_ports, start.alloc_ports, strict=True))
        for init_port, alloc_port in ports[self._rank.index :: self._rank.world_size]:
            target = Target(start.host, init_port, alloc_port)
            try:
                self._client.reserve(start.req, target, [], tokens=start.tokens, upto=0)
            except NotConnectedError:
                return  # without a sidecar nobody can notify the proxy

    def _reserve(self, outgoing: Outgoing, upto: int) -> None:
        start, rank = outgoing.start, self._rank
        if start.token:
            self._client.keep(
                start.req,
                start.token,
                rank.keys(start.hashes, start.tags, start.tokens),
                tokens=start.tokens,
                upto=upto,
                keep_ms=start.keep_ms,
            )
            self.kept.add(start.req)
            return
        target = Target(start.host, start.init_ports[rank.index], start.alloc_ports[rank.index])
        self._client.reserve(
            start.req,
            target,
            rank.keys(start.hashes, start.tags, start.tokens),
            tokens=start.tokens,
            upto=upto,
            overlap=start.overlap,
        )

    def _restart_keep(self, outgoing: Outgoing) -> None:
        """Tells the sidecar that the answer is sent now. The time for which the KV is kept begins at this moment."""
        if not outgoing.start.token or outgoing.over:
            return
        try:
            self._client.computing(outgoing.start.req, outgoing.start.tokens)
        except NotConnectedError:
            self._fail(outgoing, "sidecar_lost")

    def _gather(self, copier: Copier, entries: list[Entry]) -> None:
        take_slots(entries)
        signal = self._event_slots.take({entry.outgoing.start.req for entry in entries})
        pieces = [piece for entry in entries for piece in entry.pieces]
        fence = copier.gather(pieces, self._computed, signal, last=self._is_last)
        self._launched(fence, entries, signal)

    def _launched(
        self,
        fence: Fence,
        entries: list[Entry],
        signal: int | None,
        layers: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Records a gather, and tells the sidecar of it if the gather has an event."""
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
        """Starts a gather by ranges of layers for the chunks that this step completes. Returns `None` if there are no
        such chunks.
        """
        always = self._rank.by_layers
        entries = [
            entry
            for entry in self._complete(lambda outgoing: outgoing.upto)
            if (always or entry.outgoing.by_layers)
            # Chunks that an earlier step completed do not have to wait for this step's last layers.
            and entry.pieces[0].tokens[1] > entry.outgoing.computed
        ]
        if self._copier is None or not entries or self._event_slots.free < SPARE_EVENTS:
            return None
        layered_copy = self._copier.layered_copy([piece for entry in entries for piece in entry.pieces])
        if layered_copy is None:
            return None
        take_slots(entries)
        layered = LayeredGather(entries, layered_copy)
        for outgoing in layered.outgoings:
            outgoing.gathering += 1
        return layered

    def _gather_below(self, below: int) -> bool:
        """Gathers the next range of layers. Returns true if a layered gather is under way."""
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
        """Ends the layered gather before the sidecar knows of it. After the step, all layers of its chunks are gathered
        together.
        """
        if (layered := self._layered) is None:
            return
        self._layered = None
        if layered.ranges:
            # The GPU still copies these ranges, so the blocks must not be reused before the fence.
            fence = layered.layered_copy.fence
            self._gathers += [Gather(fence, outgoing, [], True) for outgoing in layered.outgoings]
        else:
            for outgoing in layered.outgoings:
                outgoing.gathering -= 1
        self._event_slots.put_back(signal for _, signal in layered.ranges)
        for entry in layered.entries:
            if not entry.outgoing.over:
                entry.outgoing.slots[entry.chunk] = entry.slot

    def _complete(self, upto: Callable[[Outgoing], int]) -> list[Entry]:
        """Returns the chunks that have a slot and lie within the first `upto` tokens of their request."""
        complete = []
        for outgoing in self._by_engine_id.values():
            if outgoing.over or outgoing.plan is None:
                continue
            own = [
                Entry(outgoing, chunk, slot, outgoing.pieces(outgoing.plan, chunk, slot, self._rank.tables))
                for chunk, slot in outgoing.slots.items()
                if outgoing.plan.needs(chunk) <= upto(outgoing)
            ]
            if all(self._rank.has_blocks(piece) for entry in own for piece in entry.pieces):
                complete += own
            else:
                self._give_up(outgoing, "no_block")
        return complete

    def _settle(self) -> None:
        """Tells the sidecar which gathers have finished. The sidecar already knows the gathers that have an event."""
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
        """Makes later engine work wait for the request's gathers: the request's blocks now belong to other requests."""
        for gather in self._gathers:
            if gather.outgoing is outgoing:
                self._device.hold(gather.fence)

    @staticmethod
    def _is_staged(outgoing: Outgoing) -> bool:
        return outgoing.plan is not None and outgoing.staged.issuperset(outgoing.wanted)

    def _succeed(self, outgoing: Outgoing) -> None:
        outgoing.over = True
        tokens = outgoing.start.tokens - (outgoing.have_tokens or 0)
        size = outgoing.plan.bytes if outgoing.plan is not None else 0
        seconds = outgoing.gather_seconds
        self._stats.add("saves")
        self._stats.add("save_tokens", tokens)
        self._stats.add("save_bytes", size)
        self._stats.add("gather_seconds", seconds)
        took = time.monotonic() - outgoing.began
        # Users of LMCache search their logs for this line's beginning, so these words must not change.
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
        """Ends a request from this side. `finished` tells the sidecar later, when no gather is under way."""
        if not outgoing.over:
            self._fail(outgoing, reason)
            outgoing.owes_cancel = True

    def _tell_cancel(self, outgoing: Outgoing) -> None:
        outgoing.owes_cancel = False
        try:
            self._client.cancel(outgoing.start.req)
        except NotConnectedError:
            return  # the sidecar sees the end of the connection

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
"""The minimum number of free events for the start of a layered gather. A step takes up to six events. If the events run
out, the chunks must be gathered again after the step.
"""
GATHER_TOKENS = 2048
"""Maximum number of tokens in one gather. The sidecar pushes one part while the GPU gathers the next. 2048 tokens of an
8B model are 256 MiB; smaller parts do not reach the link's speed.
"""
