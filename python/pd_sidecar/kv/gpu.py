"""Moves KV on a GPU, and orders the moves relative to the engine's computing.

A gather waits for the mark after the forward that computed its chunks. A scatter writes into the blocks of a request.
The scatter waits for the mark after all work that was launched before the request got these blocks. If the scatter did
not wait, an older step could still write to these blocks: an engine that schedules ahead may free a step's blocks while
the step is in flight.

Gathers and scatters run on a stream of their own, so that they do not wait for an unrelated step on the engine's
stream. Only two kinds of gather run on the engine's stream: a gather of the newest work, and a gather by layers. On the
engine's stream a gather needs no wait for a mark, and no other kernel runs at the same time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pd_sidecar.kv.copier import Piece
from pd_sidecar.kv.cuda import CudaError, Driver, OpenedMemory
from pd_sidecar.kv.parts_mover import PartsMover, PartsPlan
from pd_sidecar.kv.states import States
from pd_sidecar.sidecar.wire import slot_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pd_sidecar.kv.copier import Fence, Mark
    from pd_sidecar.kv.parts import Parts
    from pd_sidecar.sidecar.connection import Connection


class Gpu:
    """Implements `copier.Device`."""

    def __init__(self, parts: Parts, signals: int, chunk_tokens: int) -> None:
        """Makes the stream and the events, and compiles the kernels, before the engine captures graphs."""
        self._device = parts.device
        self._driver = Driver()
        self.name: str | None = self._driver.uuid(self._device.index or 0)
        self.is_asynchronous = True
        self._engine: list[torch.cuda.Stream] = []
        """The engine's stream; empty before the first mark. The copiers share this list."""
        with torch.cuda.device(self._device):
            # A high priority lets a move run before the engine's next kernels. The move is short, and a peer waits for
            # it.
            self._stream = torch.cuda.Stream(priority=-1)
            self._signals = [torch.cuda.Event(enable_timing=False, interprocess=True) for _ in range(signals)]
            self.events = [event.ipc_handle() for event in self._signals]
            self._warm_up(parts, chunk_tokens)

    def enter(self) -> None:
        """Selects the GPU for the calling thread, because CUDA keeps the current device per thread."""
        torch.cuda.set_device(self._device)

    def mark(self) -> Mark:
        """Returns a mark on the engine's stream."""
        event = torch.cuda.Event()
        self._engine[:] = [torch.cuda.current_stream(self._device)]
        event.record(self._engine[0])
        return event

    def hold(self, fence: Fence) -> None:
        """Makes the engine's stream wait for the move."""
        if isinstance(fence, _Move):
            torch.cuda.current_stream(self._device).wait_event(fence.end)

    def copier(self, parts: Parts, connection: Connection) -> GpuCopier:
        """Opens the sidecar's memory and returns the copier for it."""
        buffer = connection.welcome.cuda
        if buffer is None:
            raise OSError("the sidecar's buffer is not GPU memory")
        if buffer.uuid != self.name:
            raise OSError(f"the sidecar's buffer is on {buffer.uuid}, but the engine runs on {self.name}")
        try:
            memory = OpenedMemory(buffer, self._driver)
        except CudaError as error:
            raise OSError(str(error)) from error
        slots = torch.as_tensor(memory, device=self._device)
        mover = PartsMover(parts, connection.welcome.slot_bytes)
        return GpuCopier(mover, slots, self._stream, self._engine, self._signals)

    def _warm_up(self, parts: Parts, chunk_tokens: int) -> None:
        """Moves one token and the start of the state to a slot and back, so that all kernels are compiled. The pages
        hold no KV yet.
        """
        size = slot_bytes(parts.groups, chunk_tokens)
        # With several groups block 0 is refused, because vLLM uses it in place of freed blocks.
        table = torch.zeros(1, dtype=torch.int64) if parts.is_one else torch.ones(1, dtype=torch.int64)
        pieces = [
            Piece(0, table, (0, 0), (0, 0), index, bytes=min(size, part.group.bytes))
            if isinstance(part.pages, States)
            else Piece(0, table, (0, 1), (0, 1), index)
            for index, part in enumerate(parts.parts)
        ]
        slots = torch.zeros(max(part.group.bytes for part in parts.parts), dtype=torch.uint8, device=self._device)
        copier = GpuCopier(PartsMover(parts, size), slots, self._stream, self._engine, self._signals)
        for piece in pieces:
            copier.gather([piece], [self.mark()])
            copier.scatter([piece], [self.mark()])
        self._stream.synchronize()


class GpuCopier:
    """Implements `copier.Copier`."""

    def __init__(
        self,
        mover: PartsMover,
        slots: torch.Tensor,
        stream: torch.cuda.Stream,
        engine: list[torch.cuda.Stream],
        signals: list[torch.cuda.Event],
    ) -> None:
        self._mover = mover
        self._slots = slots
        self._stream = stream
        self._engine = engine
        self._signals = signals
        self._into: dict[int, _Move] = {}
        """The last gather into each slot."""

    def gather(
        self,
        pieces: Sequence[Piece],
        after: Iterable[Mark],
        signal: int | None = None,
        *,
        last: bool = False,
    ) -> Fence:
        """Copies pages to slots."""
        plan = self._mover.plan(pieces)
        stream = self._engine[0] if last and self._engine else self._stream
        move = self._launch(stream, plan, () if stream is not self._stream else after, gather=True)
        if signal is not None:
            self._signals[signal].record(stream)
        return move

    def layered_copy(self, pieces: Sequence[Piece]) -> _LayeredCopy:
        """Starts a copy of pages to slots by ranges of layers."""
        return _LayeredCopy(self, self._mover.plan(pieces))

    def gather_layers(self, plan: PartsPlan, layers: tuple[int, int], signal: int) -> _Move:
        """Copies a range of layers on the stream of the calling thread."""
        stream = torch.cuda.current_stream(self._mover.device)
        move = self._launch(stream, plan, (), layers, gather=True)
        self._signals[signal].record(stream)
        return move

    def scatter(self, pieces: Sequence[Piece], after: Iterable[Mark]) -> Fence:
        """Copies slots to pages."""
        plan = self._mover.plan(pieces)
        return self._launch(self._stream, plan, after, gather=False)

    def _launch(
        self,
        stream: torch.cuda.Stream,
        plan: PartsPlan,
        after: Iterable[Mark],
        layers: tuple[int, int] | None = None,
        *,
        gather: bool,
    ) -> _Move:
        with torch.cuda.stream(stream):
            for mark in after:
                stream.wait_event(mark)
            move = _Move(self._slots, stream)
            if gather:
                self._queue(move, plan.slots)
            move.start.record(stream)
            self._mover.move(plan, self._slots, gather=gather, layers=layers)
            move.end.record(stream)
        return move

    def _queue(self, move: _Move, slots: Iterable[int]) -> None:
        """Makes a gather wait for an earlier gather that writes into the same slot, on another stream. The sidecar may
        grant a slot again while the gather of a request that ended early still writes to the slot.
        """
        for slot in slots:
            before = self._into.get(slot)
            self._into[slot] = move
            if before is not None and before.stream != move.stream and not before.done():
                move.stream.wait_event(before.end)


class _LayeredCopy:
    """Implements `copier.LayeredCopy`."""

    def __init__(self, copier: GpuCopier, plan: PartsPlan) -> None:
        self._copier = copier
        self._plan = plan
        self._below = 0
        self._moves: list[_Move] = []

    def gather(self, below: int, signal: int) -> None:
        """Gathers the layers from the previous range's end to layer `below` (exclusive)."""
        layers = (self._below, below)
        self._moves.append(self._copier.gather_layers(self._plan, layers, signal))
        self._below = below

    @property
    def fence(self) -> _Move:
        """The fence of the last range, which ends after all other ranges."""
        last = self._moves[-1]
        last.before = self._moves[:-1]
        return last


class _Move:
    """A move under way. The move keeps the sidecar's memory open."""

    def __init__(self, slots: torch.Tensor, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)
        self.before: list[_Move] = []
        """The earlier ranges of the same gather."""
        self._slots: torch.Tensor | None = slots

    def done(self) -> bool:
        """Returns true if the move is over. Does not wait."""
        if not self.end.query():
            return False
        self._slots = None
        return True

    @property
    def seconds(self) -> float:
        """The seconds of the copy itself, without the wait before it."""
        own = float(self.start.elapsed_time(self.end)) / 1e3
        return own + sum(move.seconds for move in self.before)
