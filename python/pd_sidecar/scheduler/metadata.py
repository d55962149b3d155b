"""What the scheduler's half of the connector tells the workers' half in each step."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

# Requests have two names here: `engine_id` is vLLM's, different on the two sides; `req` is the
# proxy's, the same in all parts.


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


@dataclass(frozen=True)
class PushStep:
    """A prefill request computes in this step."""

    engine_id: str
    blocks: list[int]
    """Block ids, to be appended to the table or to replace it."""
    replace: bool
    upto: int
    """Prompt tokens that are computed when the step is over."""


@dataclass(frozen=True)
class LoadStart:
    """A decode request is parked with its blocks."""

    engine_id: str
    req: str
    hashes: list[str]
    tokens: int
    have_tokens: int
    """Computed already, in blocks that other requests may share: never to be written."""
    load_tokens: int
    """The end of what is to be loaded."""
    blocks: list[int]
    written: bool = False
    """The proxy has the word of an LMCache sender that all of it is written."""


@dataclass
class StepMetadata(KVConnectorMetadata):
    """One step. Lists of engine ids unless said otherwise."""

    push_starts: list[PushStart] = field(default_factory=list)
    push_steps: list[PushStep] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    """Prefill: their blocks belong to others from this step on."""
    unpushed: list[PushStart] = field(default_factory=list)
    """Prefill: nothing of them is moved, and a proxy waits for the sidecars' word."""
    finished: list[str] = field(default_factory=list)
    """Prefill: their blocks wait for the worker's word."""
    cancelled: list[str] = field(default_factory=list)
    """Prefill: aborted; their blocks belong to others from this step on."""
    load_starts: list[LoadStart] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    """Decode: aborted while parked; their blocks wait for the worker's word."""
    dismissed: list[str] = field(default_factory=list)
    """Decode: `req` of requests that will not be loaded, so that nobody pushes for them."""
    idle: bool = False
    """Nothing is computed in this step."""

    @property
    def has_news(self) -> bool:
        """Something must reach the workers."""
        return bool(
            self.push_starts
            or self.push_steps
            or self.preempted
            or self.unpushed
            or self.finished
            or self.cancelled
            or self.load_starts
            or self.aborted
            or self.dismissed
        )


@dataclass(frozen=True)
class DisabledNotice(KVConnectorHandshakeMetadata):
    """A worker has seen its KV and cannot move it. Said once, before the first request."""


@dataclass(frozen=True)
class IdleReport(KVConnectorWorkerMetadata):
    """What a worker says of a step beside what is done."""

    rests: bool
    """The step had nothing to do, and requests wait for a sidecar."""
    unmoved: bool = False
    """The worker cannot move this model's KV."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        unmoved = isinstance(other, IdleReport) and other.unmoved
        return IdleReport(self.rests, unmoved=True) if unmoved else self
