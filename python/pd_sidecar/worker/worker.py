"""The workers' half of the connector: one object per tensor-parallel worker.

The worker has one connection to each sidecar that it uses, for each rank that it serves.

On a GPU the engine's thread launches a step and returns up to a second later, when the GPU has computed it. Meanwhile a
second thread (`poller`) handles new grants and new chunks, and launches their moves. No thread waits between a move and
its push: CUDA events keep the two in order.

On a CPU the engine's thread makes all moves, in its steps. If the engine keeps KV for decode sides, the second thread
also runs on a CPU: it makes the moves between the steps, and a lock prevents that both threads move at the same time.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from pd_sidecar.client import Client, Connected, Ended, Granted, Hello, Lost, Ready, wait_any
from pd_sidecar.kv.device import device_of
from pd_sidecar.scheduler.kept import FetchPort
from pd_sidecar.scheduler.metadata import IdleReport
from pd_sidecar.sidecar.wire import VERSION
from pd_sidecar.worker.load import Receiver, Results
from pd_sidecar.worker.poller import Poller
from pd_sidecar.worker.push import Sender
from pd_sidecar.worker.ranks import Rank, RankCounter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pd_sidecar.client import Event
    from pd_sidecar.kv.copier import Device
    from pd_sidecar.kv.parts import Parts
    from pd_sidecar.options.config import Options
    from pd_sidecar.scheduler.metadata import CopyStart, StepMetadata
    from pd_sidecar.scheduler.stats import Stats
    from pd_sidecar.worker.ranks import Part, Share

logger = init_logger("vllm.pd_sidecar.worker.worker")


@dataclass(frozen=True)
class Link:
    """A connection, with the sender or receiver that uses it, and the heads that it serves."""

    client: Client
    end: Sender | Receiver
    parts: Parts
    device: Device
    rank: int


class Worker:
    """Carries messages between the engine's steps and the sidecars."""

    def __init__(
        self,
        parts: Parts,
        options: Options,
        stats: Stats,
        *,
        engine: str,
        share: Share,
        producer: bool,
        consumer: bool,
    ) -> None:
        self._share = share
        self._parts = parts
        self._options = options
        self._idle_wait_s = options.idle_wait_ms / 1e3
        self._producer = producer
        self._senders: list[Sender] = []
        self._receivers: list[Receiver] = []
        self._links: list[Link] = []
        self._sent, self._received = RankCounter(), RankCounter()
        self._pushed: set[str] = set()
        self._loaded = Results()
        """The requests in `_pushed` and `_loaded` are done and not reported yet."""
        self._failed: dict[str, list[int]] = {}
        """Loads that failed for one rank and may still be in flight for another rank."""
        self._unsent: set[str] = set()
        """Requests of a worker that serves no rank: they are done as soon as the engine finishes them."""
        self._idle = True
        self._idle_report: IdleReport | None = None
        self._known_ports: dict[int, FetchPort | None] = {}
        self._fetch_ports: dict[int, FetchPort | None] = {}
        """The fetch ports of the senders that the scheduler's half does not know yet, by rank."""
        self._reported = False
        self._is_asked = False
        self._lock = threading.RLock()
        self._results = threading.Lock()
        """Guards only the results. So a thread that reads the results does not wait while another thread launches
        moves.
        """
        self._poller: Poller | None = None
        for part in share.parts:
            self._serve(part, engine, stats, producer=producer, consumer=consumer)
        self._range_ends: dict[str, int] = {}
        if self._is_asynchronous and options.push != "step" and parts.is_one and _is_one_model(parts.only.names):
            names = parts.only.names
            self._range_ends = {names[below - 1]: below for below in range_ends(len(names))}

    def _serve(self, part: Part, engine: str, stats: Stats, *, producer: bool, consumer: bool) -> None:
        """Makes the connections of one rank."""
        options, ranks = self._options, self._share.ranks
        parts = self._parts if part.heads is None else self._parts.of_heads(part.heads)
        layout = parts.layout(options.model_name, options.chunk_size)
        rank = Rank(
            index=part.rank,
            world_size=ranks,
            model=options.model_name,
            dtype=layout.dtype,
            chunk_tokens=options.chunk_size,
            groups=parts.groups,
            tables=parts.tables,
            block_tokens=parts.block_tokens,
            load_deadline_ms=options.load_deadline_ms,
            save_deadline_s=options.save_deadline_ms / 1e3,
            layers=layout.layers,
            by_layers=options.push == "layers",
        )
        size = sum(group.bytes for group in rank.groups if group.kind != "state")
        logger.info("rank %d of %d: %s, %d bytes a token", part.rank, ranks, layout, size)
        # One device per connection: the sidecar waits for the events that this connection's greeting named.
        device = device_of(parts, options.chunk_size, signals=producer)

        def client(path: str, role: str) -> Client:
            events = device.events if role == "prefill" else []
            hello = Hello(VERSION, engine, role, part.rank, ranks, layout, device.name, events)
            return Client(path, hello, logger=logger)

        if producer:
            to_sender = client(options.sender_socket, "prefill")
            self._senders.append(Sender(rank, device, to_sender, stats))
            self._links.append(Link(to_sender, self._senders[-1], parts, device, part.rank))
        if consumer:
            to_receiver = client(options.receiver_socket, "decode")
            self._receivers.append(Receiver(rank, device, to_receiver, stats))
            self._links.append(Link(to_receiver, self._receivers[-1], parts, device, part.rank))

    def begin(self, metadata: StepMetadata) -> None:
        """Runs before the forward: hands the step to each connection."""
        # While a decode side fetches kept KV, the engine may run no step. So the poller's thread gathers the KV.
        keeps = any(start.token for start in metadata.push_starts)
        if (self._is_asynchronous or keeps) and self._poller is None:
            # Start the thread only in the first step: before it, the engine may be capturing graphs.
            self._poller = Poller(self)
            self._poller.start()
        self._idle = metadata.idle
        if self._is_polled and not (metadata.has_news or self._has_part_in_steps):
            return
        with self._lock:
            self.read()
            if (metadata.push_starts or metadata.load_starts) and not all(c.connected for c in self.clients):
                for client in self.clients:
                    client.settle()
                self.read()
            for link in self._links:
                link.end.begin(metadata)
            if self._producer and not self._senders:
                self._unsent.update(metadata.finished)
            self._copy(metadata.copy_starts)
        if self._idle and self._poller is not None:
            # Wake the poller's thread, which may be asleep: it must report the requests that this step has ended.
            self._poller.wake()

    def _copy(self, starts: Sequence[CopyStart]) -> None:
        """Copies KV from running requests to other sequences of the same client requests (n > 1). `Receiver.begin` has
        already launched the scatters of the running requests.
        """
        possible = [start for start in starts if start.is_possible]
        if possible:
            for part in self._parts.parts:
                sources = [block for start in possible for block in start.sources[part.table]]
                targets = [block for start in possible for block in start.blocks[part.table]]
                part.pages.copy_blocks(sources, targets)
        with self._results:
            self._loaded.received |= {start.engine_id for start in starts}
            for start in starts:
                if not start.is_possible:
                    self._loaded.failed[start.engine_id] = [block for blocks in start.blocks for block in blocks]

    def layer_computed(self, name: str) -> None:
        """Runs within the forward, after a layer's attention."""
        below = self._range_ends.get(name)
        if below is not None and any(sender.has_part_in_steps for sender in self._senders):
            with self._lock:
                # Use the slots that were granted since the step began.
                if self.read() and self._poller is not None:
                    self._poller.wake()
                for sender in self._senders:
                    sender.layers_computed(below)

    def computed(self) -> None:
        """Runs after the forward."""
        if not self._senders:
            return
        with self._lock:
            for sender in self._senders:
                sender.computed()

    def finish(self) -> tuple[set[str], Results]:
        """Ends the step: makes the moves that are possible, and returns the requests that are done."""
        moved = False
        if not self._is_polled or (self._senders and self._has_part_in_steps):
            with self._lock:
                moved = self.move()
                self.collect()
        over = bool(self._pushed or self._loaded.received)
        rests = self._idle and not moved and not over and self._is_waiting
        with self._results:
            ports, self._fetch_ports = self._fetch_ports, {}
        self._idle_report = IdleReport(rests, fetch_ports=ports) if rests or over or ports else None
        # The engine uses a report in the next step; a wait directly after a report would delay that step.
        if rests and not self._reported and not self._is_asked:
            self._rest()
        with self._results:
            loaded = self._loaded
            if self._is_asked:
                # vLLM accepts failed loads only from `finish`. The scheduler asks for all other results with `news`.
                loaded = Results(set(loaded.failed), loaded.failed)
                self._loaded = Results(self._loaded.received - loaded.received)
                return set(), loaded
            pushed, self._pushed, self._loaded = self._pushed, set(), Results()
            self._reported = bool(pushed or loaded.received)
            return pushed, loaded

    def news(self, *, rest: bool) -> tuple[set[str], set[str]]:
        """Returns the pushes and loads that are done, for a scheduler in this process.

        The scheduler calls this method while it handles the output of a step, after it has launched the next step. So
        the scheduler learns of a load one step and one pause of the engine's loop earlier than from `finish`. After the
        first call of this method, `finish` returns only failed loads and never waits. If `rest` is true and nothing is
        done yet, this method waits briefly for results.
        """
        self._is_asked = True
        if rest and not (self._pushed or self._loaded.received):
            self._rest()
        with self._results:
            pushed, self._pushed = self._pushed, set()
            received = self._loaded.received - self._loaded.failed.keys()
            self._loaded.received -= received
            return pushed, received

    @property
    def idle_report(self) -> IdleReport | None:
        """The report that goes with the step's output. Without a report, the scheduler's half does not call `news`."""
        return self._idle_report

    def first_fetch_ports(self, wait_s: float) -> dict[int, FetchPort | None]:
        """Returns the fetch ports of the sidecars that are connected. Waits at most `wait_s` for the other sidecars.
        The engine's thread calls this method once, before the first step.
        """
        clients = [link.client for link in self._links if isinstance(link.end, Sender)]
        deadline = time.monotonic() + wait_s
        while True:
            for client in clients:
                client.settle()
            self.read()
            if all(client.connected for client in clients) or time.monotonic() >= deadline:
                break
            time.sleep(CONNECT_PAUSE_S)
        with self._results:
            ports, self._fetch_ports = self._fetch_ports, {}
        return ports

    def wait_fetched(self, wait_s: float) -> int:
        """Waits at most `wait_s` until decode sides have fetched the KV that the engine keeps. Returns the number of
        requests with KV that is still kept. The engine's thread calls this method when the engine runs no more steps.
        """
        deadline = time.monotonic() + wait_s
        while True:
            self.move()
            self.collect()
            with self._lock:
                kept = sum(len(link.end.kept) for link in self._links if isinstance(link.end, Sender))
            if not kept or time.monotonic() >= deadline:
                return kept
            time.sleep(CONNECT_PAUSE_S)

    def close(self) -> None:
        """Ends the connections, and with them all requests in flight."""
        if self._poller is not None:
            self._poller.stop()
        for link in self._links:
            link.client.close()

    # The engine's thread and the poller's thread call these methods, one thread at a time.

    def read(self) -> bool:
        """Handles the messages of the sidecars. Returns true if there were any."""
        handled = False
        with self._lock:
            for link in self._links:
                for event in link.client.poll():
                    self._handle(event, link)
                    handled = True
        return handled

    def move(self) -> bool:
        """Handles the messages of the sidecars, and launches the moves that are possible. Returns true if it launched
        any.
        """
        with self._lock:
            self.read()
            moved = [link.end.move() for link in self._links]
            if self._poller is not None and self.is_moving:
                self._poller.wake()
            return any(moved)

    def collect(self) -> bool:
        """Records the requests that all ranks have finished: the engine frees blocks per worker, not per rank. Returns
        true if there is anything to report.
        """
        with self._lock:
            sent, self._unsent = self._unsent, set()
            for sender in self._senders:
                sent |= self._sent.of_all(sender.finished(), len(self._senders))
            loaded = Results()
            for receiver in self._receivers:
                results = receiver.finished()
                self._failed.update(results.failed)
                loaded.received |= self._received.of_all(results.received, len(self._receivers))
            for engine_id in loaded.received & self._failed.keys():
                loaded.failed[engine_id] = self._failed.pop(engine_id)
        with self._results:
            self._pushed |= sent
            self._loaded.received |= loaded.received
            self._loaded.failed |= loaded.failed
            return bool(self._pushed or self._loaded.received)

    @property
    def is_moving(self) -> bool:
        """True while a move is in flight and this worker must watch for its end."""
        return any(link.end.is_moving for link in self._links)

    def enter(self) -> None:
        """Prepares the calling thread for moves."""
        for link in self._links:
            link.device.enter()

    @property
    def lock(self) -> threading.RLock:
        """The lock that a thread holds while it moves."""
        return self._lock

    @property
    def clients(self) -> list[Client]:
        """The connections to the sidecars."""
        return [link.client for link in self._links]

    @property
    def _is_waiting(self) -> bool:
        return any(link.end.is_waiting for link in self._links)

    @property
    def _is_asynchronous(self) -> bool:
        return any(link.device.is_asynchronous for link in self._links)

    @property
    def _is_polled(self) -> bool:
        """True if the poller's thread reads and moves, so that steps without KV to move skip this work."""
        return self._poller is not None and self._poller.is_alive()

    @property
    def _has_part_in_steps(self) -> bool:
        return not self._idle and any(link.end.has_part_in_steps for link in self._links)

    def _rest(self) -> None:
        """Waits briefly for news. If the engine did not rest while all of its requests wait for a sidecar, it would use
        a whole core.
        """
        if self._poller is not None:
            self._poller.wait(self._idle_wait_s)
            return
        wait_any([link.client for link in self._links], self._idle_wait_s)
        with self._lock:
            self.move()
            self.collect()

    def _handle(self, event: Event, link: Link) -> None:
        if isinstance(event, Connected):
            self._connected(link)
        elif isinstance(event, Lost):
            logger.warning("%s: %s", link.client.path, event.why)
            self._note_fetch_port(link, None)
            link.end.lost()
        elif isinstance(event, Ended):
            link.end.ended(event)
        elif isinstance(event, Granted) and isinstance(link.end, Sender):
            link.end.granted(event)
        elif isinstance(event, Ready) and isinstance(link.end, Receiver):
            link.end.ready(event)
        else:
            logger.error("%s sent %s, which this side does not handle", link.client.path, event)

    def _connected(self, link: Link) -> None:
        try:
            copier = link.device.copier(link.parts, link.client.connection)
        except OSError as error:
            logger.error("%s is not used, requests are computed here: %s", link.client.path, error)
            link.client.give_up(f"the sidecar's buffer cannot be used: {error}")
            link.end.lost()
        else:
            welcome = link.client.welcome
            fetch = welcome.fetch
            port = FetchPort(fetch.host, fetch.port, welcome.epoch) if fetch is not None else None
            self._note_fetch_port(link, port)
            link.end.connected(copier)

    def _note_fetch_port(self, link: Link, port: FetchPort | None) -> None:
        if isinstance(link.end, Sender) and self._known_ports.get(link.rank) != port:
            self._known_ports[link.rank] = port
            with self._results:
                self._fetch_ports[link.rank] = port


def _is_one_model(names: Sequence[str]) -> bool:
    """Returns true if the engine computes layers in the order of their names. With a draft model this is false: the
    layers of the draft model come first in the order of the names, but the engine computes them last.
    """
    return len({re.sub(r"\d+", "", name) for name in names}) == 1


def range_ends(layers: int) -> list[int]:
    """Returns the first layer after each range of layers, except for the last range.

    A link that is faster than the computing needs only one range. With only one range, the range should end late, so
    that little is left to push after the step. With a slower link, the push ends sooner if the first range ends
    earlier.
    """
    wanted = {layers * part // 16 for part in (4, 8, 12, 14, 15)}
    return sorted(below for below in wanted if 0 < below < layers)


CONNECT_PAUSE_S = 0.01
"""Seconds between two checks of the connections that a starting engine waits for."""
