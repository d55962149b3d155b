"""The messages from the scheduler's half of the connector to the workers' half, one per step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

if TYPE_CHECKING:
    from pd_sidecar.scheduler.kept import FetchPort, KeptSource
    from pd_sidecar.scheduler.tables import Tables

# A request has two names in these messages. `engine_id` is vLLM's name, and differs between the two sides. `req` is the
# proxy's name, and is the same everywhere.


@dataclass(frozen=True)
class PushStart:
    """A prefill request is scheduled for the first time."""

    engine_id: str
    req: str
    host: str
    init_ports: tuple[int, ...]
    alloc_ports: tuple[int, ...]
    hashes: list[str]
    tokens: int
    overlap: bool
    tags: list[str] = field(default_factory=list)
    """The tags of each chunk's key; empty if no chunk has a tag."""
    token: str = ""
    """The name under which the engine keeps the KV; empty if the request names its receiver."""
    keep_ms: int = 0
    """Milliseconds for which the KV is kept if no decode side sends a message."""


@dataclass(frozen=True)
class PushStep:
    """A prefill request computes in this step."""

    engine_id: str
    tables: Tables
    """Block ids of each of vLLM's groups. They are appended to the request's tables, unless `replace` or `is_whole` is
    true. Empty if there are no new blocks.
    """
    replace: bool
    """True if these blocks are the request's new tables, and no token counts as computed."""
    upto: int
    """The number of prompt tokens that are computed when the step is over."""
    is_whole: bool = False
    """True if these blocks are the whole tables. What is computed stays computed."""


@dataclass(frozen=True)
class LoadStart:
    """A decode request is parked with its blocks."""

    engine_id: str
    req: str
    hashes: list[str]
    tokens: int
    have_tokens: int
    """Tokens that are computed already, in blocks that other requests may share. The worker never writes to those
    blocks.
    """
    load_tokens: int
    """The end (exclusive) of the tokens to load, which begin after `have_tokens`."""
    tables: Tables
    """The block ids of each of vLLM's groups."""
    missing_blocks: list[int]
    """The blocks of the first group that lack KV until the load is over."""
    written: bool = False
    """True if an LMCache sender has told the proxy that the whole prompt is written."""
    tags: list[str] = field(default_factory=list)
    """As in `PushStart`."""
    source: KeptSource | None = None
    """The place where a prefill engine keeps the KV; `None` if a sender pushes the KV by itself."""


@dataclass(frozen=True)
class CopyStart:
    """A decode request has the same prompt as a running request, and copies that request's KV, block by block."""

    engine_id: str
    sources: Tables
    """The blocks to copy from, by vLLM group. They hold the KV until this step computes."""
    blocks: Tables
    """The blocks to copy to, one for each block of `sources`."""
    is_possible: bool = True
    """False if the other request lacks a block. The worker then reports a failed load."""


@dataclass
class StepMetadata(KVConnectorMetadata):
    """The message of one step. Lists hold engine ids unless a field says otherwise."""

    push_starts: list[PushStart] = field(default_factory=list)
    push_steps: list[PushStep] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    """Prefill: requests whose blocks vLLM gives to other requests from this step on."""
    unpushed: list[PushStart] = field(default_factory=list)
    """Prefill: requests whose KV is not moved, although their proxy waits for a notification from the sidecars."""
    finished: list[str] = field(default_factory=list)
    """Prefill: finished requests whose blocks the engine holds until the worker reports them."""
    cancelled: list[str] = field(default_factory=list)
    """Prefill: aborted requests. vLLM gives their blocks to other requests from this step on."""
    load_starts: list[LoadStart] = field(default_factory=list)
    copy_starts: list[CopyStart] = field(default_factory=list)
    expected: list[tuple[str, KeptSource]] = field(default_factory=list)
    """Decode: the `req` of requests whose KV waits at a prefill engine, and the place."""
    aborted: list[str] = field(default_factory=list)
    """Decode: requests that were aborted while parked. The engine holds their blocks until the worker reports the
    requests.
    """
    dismissed: list[str] = field(default_factory=list)
    """Decode: the `req` of requests that will not be loaded, so that no sender pushes for them."""
    idle: bool = False
    """True if the engine computes nothing in this step."""

    @property
    def has_news(self) -> bool:
        """True if something in this step must reach the workers."""
        return bool(
            self.push_starts
            or self.push_steps
            or self.preempted
            or self.unpushed
            or self.finished
            or self.cancelled
            or self.load_starts
            or self.copy_starts
            or self.expected
            or self.aborted
            or self.dismissed
        )


@dataclass(frozen=True)
class DisabledNotice(KVConnectorHandshakeMetadata):
    """A worker has found that it cannot move its KV. The scheduler's half learns this before the first request."""


@dataclass(frozen=True)
class FetchNotice(KVConnectorHandshakeMetadata):
    """A worker's sidecars can keep KV for decode sides. The scheduler's half learns this before the first request."""

    ports: dict[int, FetchPort | None]
    """The same as `IdleReport.fetch_ports`."""


@dataclass(frozen=True)
class IdleReport(KVConnectorWorkerMetadata):
    """A worker's report about a step. The finished requests are reported separately."""

    rests: bool
    """True if the step had nothing to do and requests wait for a sidecar."""
    unmoved: bool = False
    """True if the worker cannot move this model's KV."""
    fetch_ports: dict[int, FetchPort | None] = field(default_factory=dict)
    """The fetch ports, by rank, of the sidecars to which this worker has connected since its last report; `None` for a
    sidecar without a fetch port.
    """
    is_alone: bool = False
    """True if the worker's connector is not the child of a MultiConnector."""
    failed: frozenset[str] = frozenset()
    """The loads of several groups that have failed on this worker, if vLLM itself accepts no such report. Another
    worker may report the same load as done later.
    """

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        if not isinstance(other, IdleReport):
            return self
        return IdleReport(
            self.rests,
            unmoved=self.unmoved or other.unmoved,
            fetch_ports={**self.fetch_ports, **other.fetch_ports},
            is_alone=self.is_alone and other.is_alone,
            failed=self.failed | other.failed,
        )
