"""The workers' half: one per tensor-parallel rank, with a connection to each sidecar it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from .client import Client, Connected, Ended, Granted, Hello, Lost, Ready, wait_any
from .kernels import Copier
from .loading import Receiver, Results
from .sending import Sender
from .wire import VERSION

if TYPE_CHECKING:
    from .client import Event
    from .config import Options
    from .layout import Geometry
    from .metadata import StepMetadata
    from .stats import Stats

logger = init_logger("vllm.pd_sidecar.worker")


@dataclass(frozen=True)
class Rank:
    """What a worker is, and the bounds it keeps to."""

    index: int
    world_size: int
    model: str
    dtype: str
    chunk_tokens: int
    block_tokens: int
    token_bytes: int
    load_deadline_ms: int
    save_deadline_s: float

    @property
    def load_limit_s(self) -> float:
        """When a sidecar that should have said `Ended` is not waited for any longer."""
        return self.load_deadline_ms / 1e3 + GRACE_S


class Link:
    """A connection, and which half of the work it is for."""

    def __init__(self, client: Client, end: Sender | Receiver) -> None:
        self.client = client
        self.end = end


class Worker:
    """Pumps messages between the engine's steps and the sidecars."""

    def __init__(
        self,
        geometry: Geometry,
        options: Options,
        stats: Stats,
        *,
        engine: str,
        index: int,
        world_size: int,
        producer: bool,
        consumer: bool,
    ) -> None:
        layout = geometry.layout(options.model_name, options.chunk_size)
        rank = Rank(
            index=index,
            world_size=world_size,
            model=options.model_name,
            dtype=layout.dtype,
            chunk_tokens=options.chunk_size,
            block_tokens=geometry.block_tokens,
            token_bytes=geometry.token_bytes,
            load_deadline_ms=options.load_deadline_ms,
            save_deadline_s=options.save_deadline_ms / 1e3,
        )
        logger.info(
            "rank %d of %d: %s, %d bytes a token", index, world_size, layout, rank.token_bytes
        )
        self._geometry = geometry
        self._idle_wait_s = options.idle_wait_ms / 1e3
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None
        self._links: list[Link] = []
        self._idle = True

        def link(path: str, role: str) -> Client:
            hello = Hello(VERSION, engine, role, index, world_size, layout)
            return Client(path, hello, logger=logger)

        if producer:
            client = link(options.sender_socket, "prefill")
            self._sender = Sender(rank, client, stats)
            self._links.append(Link(client, self._sender))
        if consumer:
            client = link(options.receiver_socket, "decode")
            self._receiver = Receiver(rank, client, stats)
            self._links.append(Link(client, self._receiver))

    def begin(self, metadata: StepMetadata) -> None:
        """Before the forward."""
        self._idle = metadata.idle
        self._read()
        if self._sender is not None:
            self._sender.begin(metadata)
        if self._receiver is not None:
            self._receiver.begin(metadata)

    def computed(self) -> None:
        """After the forward."""
        if self._sender is not None:
            self._sender.computed()

    def finish(self) -> tuple[set[str], Results]:
        """At the end of the step: moves what can be moved, names what is done."""
        self._read()
        moved = self._pump()
        sent, results = self._results()
        if self._idle and not moved and not sent and not results.received and self._is_waiting:
            # Without this an engine that only waits would spin.
            wait_any([link.client for link in self._links], self._idle_wait_s)
            self._read()
            self._pump()
            sent, results = self._results()
        return sent, results

    def close(self) -> None:
        """Ends the connections: what they held ends with them."""
        for link in self._links:
            link.client.close()

    @property
    def _is_waiting(self) -> bool:
        return any(link.end.is_waiting for link in self._links)

    def _results(self) -> tuple[set[str], Results]:
        sent = self._sender.finished() if self._sender is not None else set()
        return sent, self._receiver.finished() if self._receiver is not None else Results()

    def _pump(self) -> bool:
        moved = [link.end.pump() for link in self._links]
        return any(moved)

    def _read(self) -> None:
        for link in self._links:
            for event in link.client.poll():
                self._handle(event, link)

    def _handle(self, event: Event, link: Link) -> None:
        if isinstance(event, Connected):
            self._connected(link)
        elif isinstance(event, Lost):
            logger.warning("%s: %s", link.client.path, event.why)
            link.end.lost()
        elif isinstance(event, Ended):
            link.end.ended(event)
        elif isinstance(event, Granted) and isinstance(link.end, Sender):
            link.end.granted(event)
        elif isinstance(event, Ready) and isinstance(link.end, Receiver):
            link.end.ready(event)
        else:
            logger.error("%s sent %s, which is not for this side", link.client.path, event)

    def _connected(self, link: Link) -> None:
        connection = link.client.connection
        link.end.connected(Copier(self._geometry, connection.memory, connection.welcome.slot_bytes))


class Unmoved:
    """In the place of a worker whose KV cannot be moved: what is asked of it fails at once."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._sent: set[str] = set()
        self._results = Results()

    def begin(self, metadata: StepMetadata) -> None:
        """Before the forward."""
        self._sent.update(metadata.finished)
        for start in metadata.load_starts:
            self._stats.add_reason("load_failures", "layout")
            self._results.received.add(start.engine_id)
            self._results.failed.add(start.engine_id)
            self._results.invalid_blocks.update(start.blocks)
        for _ in metadata.push_starts:
            self._stats.add_reason("save_failures", "layout")

    def computed(self) -> None:
        """After the forward."""

    def finish(self) -> tuple[set[str], Results]:
        """At the end of the step."""
        sent, self._sent = self._sent, set()
        results, self._results = self._results, Results()
        return sent, results

    def close(self) -> None:
        """Nothing is open."""


GRACE_S = 2.0
"""A deadline is the sidecar's to keep; this much later it is taken for dead."""
