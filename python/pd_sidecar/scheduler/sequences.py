"""Copies the KV of several groups to the other sequences of a client request (n > 1).

The first sequence loads the KV. Its windows and states hold what the other sequences need only until its first step: a
state cannot go back, and a window moves on. So the other sequences must be scheduled in the same step as the first
sequence's first step. The workers copy before this step computes anything. A sequence that comes later computes its
prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pd_sidecar.scheduler.states import LoadPhase
from pd_sidecar.scheduler.tables import NULL_BLOCK, present

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pd_sidecar.scheduler.states import Load
    from pd_sidecar.scheduler.tables import TableRule, Tables


def is_at_its_first_step(source: Load) -> bool | None:
    """Returns true if the step that is being scheduled is the first one after the load of `source`. Returns `None`
    before this step, and false after it.
    """
    request = source.request
    if source.phase is LoadPhase.ABORTED:
        return False
    if source.phase is not LoadPhase.SETTLED or request.status.name == "WAITING_FOR_REMOTE_KVS":
        return None
    if request.num_computed_tokens != source.pushed_tokens:
        return False
    return True if request.status.name == "RUNNING" else None


def blocks_to_copy(
    rules: Sequence[TableRule], sources: Sequence[Sequence[int]], own: Sequence[Sequence[int]], tokens: int
) -> tuple[Tables, Tables] | None:
    """Returns the blocks to copy from and to, by group, for a sequence that resumes at token `tokens`. `sources` are
    the tables of the first sequence, `own` those of the sequence that copies. Returns `None` if the first sequence
    lacks a block.
    """
    origins: list[list[int]] = []
    targets: list[list[int]] = []
    for rule, source, table in zip(rules, sources, own, strict=True):
        last = -(-tokens // rule.block_tokens)
        if len(source) < last:
            return None
        if rule.is_state:
            pairs = [(source[last - 1], block) for block in present(table, rule.scratch_blocks)]
        else:
            pairs = list(zip(source[:last], table, strict=False))
        # Blocks of the prefix cache are in both tables.
        wanted = [pair for pair in pairs if NULL_BLOCK != pair[1] != pair[0]]
        if any(origin == NULL_BLOCK for origin, _ in wanted):
            return None
        origins.append([origin for origin, _ in wanted])
        targets.append([target for _, target in wanted])
    return tuple(origins), tuple(targets)
