"""Reads from vLLM's output of a scheduling step which requests get tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.core.sched.output import SchedulerOutput


def scheduled(output: SchedulerOutput) -> Iterator[tuple[str, list[int], bool, int]]:
    """Yields for each scheduled request: id, blocks, true if the blocks replace its table, and number of computed
    tokens.
    """
    for new in output.scheduled_new_reqs:
        # With the newer model runner, requests that resume after a preemption are in this list, too.
        yield new.req_id, _only_group(new.block_ids), True, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    for engine_id, blocks, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        yield engine_id, _only_group(blocks), engine_id in cached.resumed_req_ids, computed


def _only_group(blocks: tuple[list[int], ...] | None) -> list[int]:
    # If there are several groups, the scheduler makes no `Push`, so no code uses the first group's blocks.
    return blocks[0] if blocks else []
