"""Scatters the chunks that have arrived at a decode worker into the pages of parked requests.

The worker reports every parked request exactly once. The worker reports a loaded request as soon as the last chunk has
arrived in a slot, even if the scatter is not over. So the engine prepares the next step during the scatter. `begin` and
`Device.hold` make that step's computing wait for the scatter. The worker reports a failed request only when it no
longer writes into the request's blocks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger

from pd_sidecar.client import Ended, NotConnectedError, Ready
from pd_sidecar.kv.copier import piece_of
from pd_sidecar.sidecar.wire import Keeper, WireError

if TYPE_CHECKING:
    from pd_sidecar.client import Client
    from pd_sidecar.kv.copier import Copier, Device, Fence, Mark, Piece
    from pd_sidecar.kv.plan import Plan
    from pd_sidecar.scheduler.kept import KeptSource
    from pd_sidecar.scheduler.metadata import LoadStart, StepMetadata
    from pd_sidecar.scheduler.stats import Stats
    from pd_sidecar.worker.ranks import Rank

logger = init_logger("vllm.pd_sidecar.worker.load")


@dataclass
class Incoming:
    """One parked request."""

    start: LoadStart
    tables: dict[int, torch.Tensor]
    """The block tables, by vLLM group."""
    plan: Plan
    began: float
    mark: Mark
    """The mark after all engine work that may still write to the request's blocks."""
    missing: set[int]
    """The wanted chunks that have not arrived."""
    arrived: int = 0
    """The number of chunks that are in slots and whose scatter has not started."""
    scattering: int = 0
    scatter_seconds: float = 0.0
    failure: str | None = None
    owes_abort: bool = False
    reported: bool = False


@dataclass(frozen=True)
class _Scatter:
    """A scatter that is under way."""

    fence: Fence
    incoming: Incoming
    chunks: list[int]


@dataclass
class Results:
    """The requests that the worker reports to the scheduler."""

    received: set[str] = field(default_factory=set)
    failed: dict[str, list[int]] = field(default_factory=dict)
    """The requests of `received` whose KV is incomplete, each with the blocks that lack KV."""

    @property
    def invalid_blocks(self) -> set[int]:
        """All blocks of `failed`. Some versions of vLLM, such as 0.24, accept failures by block only."""
        return {block for blocks in self.failed.values() for block in blocks}


class Receiver:
    """Loads all parked requests of one rank of this worker."""

    def __init__(self, rank: Rank, device: Device, client: Client, stats: Stats) -> None:
        self._rank = rank
        self._device = device
        self._client = client
        self._stats = stats
        self._copier: Copier | None = None
        self._by_engine_id: dict[str, Incoming] = {}
        self._by_req: dict[str, Incoming] = {}
        self._ready: list[tuple[Incoming, int, list[Piece]]] = []
        self._scatters: list[_Scatter] = []

    def begin(self, metadata: StepMetadata) -> None:
        """Asks the sidecar for the KV of the requests that this step parks, and ends the aborted requests."""
        # First launch the scatters of chunks that have arrived: this step may use blocks of requests that were reported
        # before their scatter.
        self._scatter()
        for scatter in self._scatters:
            self._device.hold(scatter.fence)
        mark = self._device.mark() if metadata.load_starts else None
        for req, source in metadata.expected:
            self._expect(req, source)
        for start in metadata.load_starts:
            self._await(start, mark)
        for engine_id in metadata.aborted:
            if incoming := self._by_engine_id.get(engine_id):
                self._give_up(incoming, "aborted")
        for req in metadata.dismissed:
            self._tell_abort(req)

    def connected(self, copier: Copier) -> None:
        """Takes the copier for a new connection, which has a new buffer."""
        self._copier = copier

    def lost(self) -> None:
        """Fails all requests after the connection has ended: no sidecar fills their slots any more."""
        # Scatter the reported requests: the engine relies on their KV. The slots of these requests stay mapped, and no
        # process writes to them.
        self._ready = [entry for entry in self._ready if entry[0].reported]
        self._scatter()
        self._copier = None
        self._ready.clear()
        for incoming in self._by_engine_id.values():
            self._fail(incoming, "sidecar_lost")

    def ready(self, message: Ready) -> None:
        """Stores the chunks that the engine may read now, and releases the chunks that no request wants."""
        incoming = self._by_req.get(message.req)
        if incoming is None or incoming.failure is not None:
            self._release(message.req, message.chunks, 0)
            return
        packed = self._rank.plan(incoming.start.tokens, message.first_token)
        for chunk, slot in zip(message.chunks, message.slots, strict=True):
            if chunk not in incoming.missing:
                self._release(message.req, [chunk], 0)
                continue
            pieces = self._pieces(incoming, packed, chunk, slot)
            if pieces is None:
                self._give_up(incoming, "bad_chunk")
                return
            if not all(map(self._rank.has_blocks, pieces)):
                self._give_up(incoming, "no_block")
                return
            incoming.missing.discard(chunk)
            if pieces:
                self._ready.append((incoming, chunk, pieces))
                incoming.arrived += 1
            else:
                self._release(message.req, [chunk], 0)

    def ended(self, message: Ended) -> None:
        """Ends a request after the sidecar's last message about it."""
        incoming = self._by_req.get(message.req)
        if incoming is not None and incoming.missing:
            # The sidecar keeps the slots that it has announced until this side releases them.
            self._give_up(incoming, message.reason or "incomplete")

    def move(self) -> bool:
        """Scatters the chunks that have arrived. Returns true if any chunks had arrived."""
        moved = self._scatter()
        self._settle()
        return moved

    def finished(self) -> Results:
        """Returns the requests that are loaded or have failed. Returns each request once."""
        now = time.monotonic()
        results = Results()
        for engine_id, incoming in list(self._by_engine_id.items()):
            if incoming.failure is None and now > incoming.began + self._rank.load_limit_s:
                self._give_up(incoming, "deadline")
            if incoming.missing if incoming.failure is None else incoming.scattering:
                continue
            if incoming.owes_abort:
                self._tell_abort(incoming.start.req)
            del self._by_engine_id[engine_id]
            del self._by_req[incoming.start.req]
            results.received.add(engine_id)
            if incoming.failure is None:
                incoming.reported = True
                if not (incoming.arrived or incoming.scattering):
                    self._succeed(incoming)
            else:
                results.failed[engine_id] = incoming.start.missing_blocks
        return results

    @property
    def is_waiting(self) -> bool:
        """True while a request waits for a message of the sidecar."""
        return bool(self._by_engine_id)

    @property
    def has_part_in_steps(self) -> bool:
        """True if the next step's computing must wait for a scatter."""
        return bool(self._ready or self._scatters)

    @property
    def is_moving(self) -> bool:
        """True while a scatter is under way, so that the sidecar cannot use its slots for other chunks yet."""
        return bool(self._scatters)

    def _pieces(self, incoming: Incoming, packed: Plan, chunk: int, slot: int) -> list[Piece] | None:
        """Returns the pieces of a chunk that this engine needs. `None` if a part of the chunk starts at a later token
        than this engine needs.
        """
        pieces = []
        arrived = {part.group: part for part in packed.parts(chunk)}
        for wanted in incoming.plan.parts(chunk):
            part = arrived.get(wanted.group)
            if part is None or part.tokens[0] > wanted.tokens[0]:
                return None
            tokens = wanted.tokens[0], min(wanted.tokens[1], incoming.start.load_tokens)
            if not packed.is_state(chunk) and tokens[0] >= tokens[1]:
                continue
            pieces.append(piece_of(part, slot, incoming.tables[self._rank.tables[part.group]], tokens))
        return pieces

    def _await(self, start: LoadStart, mark: Mark) -> None:
        rank = self._rank
        incoming = Incoming(
            start=start,
            tables={group: torch.tensor(start.tables[group], dtype=torch.int64) for group in set(rank.tables)},
            plan=(plan := rank.plan(start.tokens, start.have_tokens)),
            began=time.monotonic(),
            mark=mark,
            missing=set(plan.wanted()),
        )
        self._by_engine_id[start.engine_id] = incoming
        self._by_req[start.req] = incoming
        if rank.is_partial and start.load_tokens != start.tokens:
            # The engine takes fewer tokens than are offered. The window or the state of another position is of no use.
            self._fail(incoming, "bad_chunk")
            self._tell_abort(start.req)
            return
        if start.source is not None:
            # Send `Expect` again, for a sidecar that has restarted since the request arrived.
            self._expect(start.req, start.source)
        try:
            self._client.await_(
                start.req,
                rank.keys(start.hashes, start.tags, start.tokens),
                tokens=start.tokens,
                have_tokens=start.have_tokens,
                deadline_ms=rank.load_deadline_ms,
                written=start.written,
            )
        except NotConnectedError:
            self._fail(incoming, "no_sidecar")
        except WireError:
            self._fail(incoming, "too_large")

    def _expect(self, req: str, source: KeptSource) -> None:
        port = source.ports[self._rank.index]
        try:
            self._client.expect(
                req, source.token, Keeper(port.host, port.port), epoch=port.epoch, keep_ms=source.keep_ms
            )
        except NotConnectedError:
            return  # the request's `Await` fails as well

    def _scatter(self) -> bool:
        """Launches a scatter of the chunks that have arrived. Returns true if any chunks had arrived."""
        ready = [entry for entry in self._ready if entry[0].failure is None]
        if not ready or self._copier is None:
            self._ready.clear()
            return False
        marks = {id(incoming.mark): incoming.mark for incoming, _, _ in ready}
        fence = self._copier.scatter([piece for _, _, pieces in ready for piece in pieces], marks.values())
        chunks: dict[int, tuple[Incoming, list[int]]] = {}
        for incoming, chunk, _ in ready:
            chunks.setdefault(id(incoming), (incoming, []))[1].append(chunk)
        for incoming, of_request in chunks.values():
            incoming.arrived -= len(of_request)
            incoming.scattering += 1
            self._scatters.append(_Scatter(fence, incoming, of_request))
        # Clear the list only now: a reader without the lock must find each chunk in one of the two lists.
        self._ready.clear()
        return True

    def _settle(self) -> None:
        """Releases the slots of finished scatters."""
        under_way: list[_Scatter] = []
        for scatter in self._scatters:
            if not scatter.fence.done():
                under_way.append(scatter)
                continue
            incoming = scatter.incoming
            seconds = scatter.fence.seconds
            incoming.scattering -= 1
            incoming.scatter_seconds += seconds
            self._release(incoming.start.req, scatter.chunks, round(seconds * 1e6))
            if incoming.reported and not (incoming.arrived or incoming.scattering):
                self._succeed(incoming)
        self._scatters = under_way

    def _release(self, req: str, chunks: list[int], micros: int) -> None:
        try:
            self._client.release(req, chunks, micros)
        except NotConnectedError:
            return  # the slots are gone with the connection

    def _succeed(self, incoming: Incoming) -> None:
        start = incoming.start
        tokens, parked = start.load_tokens - start.have_tokens, time.monotonic() - incoming.began
        unused = (start.tokens - start.load_tokens) * sum(group.bytes for group in self._rank.groups)
        size, seconds = incoming.plan.bytes - unused, incoming.scatter_seconds
        self._stats.add("loads")
        self._stats.add("load_tokens", tokens)
        self._stats.add("load_bytes", size)
        self._stats.add("load_seconds", parked)
        self._stats.add("scatter_seconds", seconds)
        # Users of LMCache search their logs for this line's beginning, so these words must not change.
        logger.info(
            "[req_id=%s] Retrieved %d out of %d required tokens (from %d total tokens). "
            "size: %.4f gb, cost %.4f ms, throughput: %.4f GB/s; scatter %.4f ms (%.1f GB/s)",
            start.req,
            tokens,
            start.tokens - start.have_tokens,
            start.tokens,
            size / 1e9,
            parked * 1e3,
            size / 1e9 / parked if parked else 0.0,
            seconds * 1e3,
            size / 1e9 / seconds if seconds else 0.0,
        )

    def _give_up(self, incoming: Incoming, reason: str) -> None:
        """Ends a request before the sidecar does. `finished` tells the sidecar later, when no scatter is under way."""
        if incoming.failure is None:
            self._fail(incoming, reason)
            incoming.owes_abort = True

    def _tell_abort(self, req: str) -> None:
        try:
            self._client.abort(req)
        except NotConnectedError:
            return  # the sidecar sees the end of the connection

    def _fail(self, incoming: Incoming, reason: str) -> None:
        if incoming.failure is not None:
            return
        incoming.failure = reason
        self._stats.add_reason("load_failures", reason)
        logger.info(
            "%s: not loaded (%s) after %.1f ms",
            incoming.start.req,
            reason,
            (time.monotonic() - incoming.began) * 1e3,
        )
