"""Reads from vLLM's output of a scheduling step which requests get tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.core.sched.output import SchedulerOutput

    from pd_sidecar.scheduler.tables import Tables


def scheduled(output: SchedulerOutput) -> Iterator[tuple[str, Tables, bool, int]]:
    """Yields for each scheduled request: id, blocks of each group, true if the blocks replace its tables, and number of
    computed tokens. The blocks are empty if the request gets no new blocks in this step.
    """
    for new in output.scheduled_new_reqs:
        # With the newer model runner, requests that resume after a preemption are in this list, too.
        yield new.req_id, new.block_ids, True, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    for engine_id, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        yield engine_id, blocks or (), engine_id in cached.resumed_req_ids, computed


def tables_now(output: SchedulerOutput, engine_id: str) -> Tables | None:
    """Returns the whole tables of a scheduled request; `None` if this version of vLLM does not tell them.

    With several groups the new blocks of a step are not enough: vLLM also replaces blocks in the middle of a table of
    states.
    """
    state = getattr(output, "kv_connector_block_state", None)
    return state.get_block_ids(engine_id) if state is not None else None
