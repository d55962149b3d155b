"""Replaces a worker whose KV cannot be moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger

from pd_sidecar.scheduler.metadata import IdleReport
from pd_sidecar.sidecar.reconnect import Pauses, Reconnector
from pd_sidecar.sidecar.wire import Hello
from pd_sidecar.worker.load import Results

if TYPE_CHECKING:
    from pd_sidecar.options.config import Options
    from pd_sidecar.scheduler.metadata import StepMetadata
    from pd_sidecar.scheduler.stats import Stats
    from pd_sidecar.worker.ranks import Share

logger = init_logger("vllm.pd_sidecar.worker.disabled")


class DisabledWorker:
    """Fails every transfer at once, and tells the sidecars why.

    Without a greeting from its engine a sidecar never becomes ready, and the proxy refuses every request, although the
    engine can compute the request.
    """

    def __init__(
        self,
        why: str,
        options: Options,
        stats: Stats,
        *,
        engine: str,
        share: Share,
        producer: bool,
        consumer: bool,
    ) -> None:
        self.why = why
        self._stats = stats
        self._sent: set[str] = set()
        self._results = Results()
        ends = [(options.sender_socket, "prefill")] if producer else []
        ends += [(options.receiver_socket, "decode")] if consumer else []
        self._reconnectors = [
            Reconnector(
                path,
                Hello.of_unmoved(engine, role, part.rank, share.ranks, options.model_name, why),
                Pauses(),
                logger,
            )
            for part in share.parts
            for path, role in ends
        ]
        for reconnector in self._reconnectors:
            reconnector.start()

    def begin(self, metadata: StepMetadata) -> None:
        """Fails the transfers that start in this step."""
        self._sent.update(metadata.finished)
        for start in metadata.load_starts:
            self._stats.add_reason("load_failures", "layout")
            self._results.received.add(start.engine_id)
            self._results.failed[start.engine_id] = start.missing_blocks
        for copy in metadata.copy_starts:
            self._results.received.add(copy.engine_id)
            self._results.failed[copy.engine_id] = [block for blocks in copy.blocks for block in blocks]
        for _ in metadata.push_starts:
            self._stats.add_reason("save_failures", "layout")

    def layer_computed(self, name: str) -> None:
        """Does nothing: no layer is gathered."""

    def computed(self) -> None:
        """Does nothing: no chunk is gathered."""

    def finish(self) -> tuple[set[str], Results]:
        """Returns the transfers that failed in this step."""
        sent, self._sent = self._sent, set()
        results, self._results = self._results, Results()
        return sent, results

    @property
    def idle_report(self) -> IdleReport:
        """Tells the scheduler's half that this worker moves nothing."""
        return IdleReport(rests=False, unmoved=True)

    def close(self) -> None:
        """Ends the connections."""
        for reconnector in self._reconnectors:
            reconnector.stop()
