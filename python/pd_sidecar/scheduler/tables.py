"""Reads the block tables of vLLM's KV cache groups.

vLLM has one table for each group. A table of a window contains block 0, the null block, for tokens that have left the
window. A table of a state contains the block of the present state, and other blocks that are of no use for a transfer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, MambaSpec, SlidingWindowSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec

Tables = tuple[list[int], ...]
"""The block ids of a request, one list per vLLM group."""

NULL_BLOCK = 0
"""The block that vLLM puts into a table in the place of a block that it has freed."""


@dataclass(frozen=True)
class TableRule:
    """The meaning of one group's table."""

    block_tokens: int
    """The number of tokens of a block."""
    is_state: bool = False
    scratch_blocks: int = 0
    """For state: the number of blocks at the table's end that belong to speculative decoding."""
    is_partial: bool = False
    """True if the decode side needs only a part of the tokens: a window, a chunk of local attention, or a state."""


def table_rules(groups: Sequence[KVCacheGroupSpec], block_tokens: int) -> tuple[TableRule, ...]:
    """Returns the rules of vLLM's groups. `block_tokens` is the size of a block if there is only one group."""
    if len(groups) == 1:
        return (_rule(groups[0].kv_cache_spec, block_tokens),)
    return tuple(_rule(group.kv_cache_spec, group.kv_cache_spec.block_size) for group in groups)


def _rule(spec: KVCacheSpec, block_tokens: int) -> TableRule:
    # If layers of one type differ in size, each layer has its own spec.
    spec = next(iter(getattr(spec, "kv_cache_specs", {"": spec}).values()))
    if isinstance(spec, MambaSpec):
        return TableRule(block_tokens, True, spec.num_speculative_blocks, is_partial=True)
    return TableRule(block_tokens, is_partial=isinstance(spec, (SlidingWindowSpec, ChunkedLocalAttentionSpec)))


def used(rules: Sequence[TableRule], tables: Sequence[Sequence[int]]) -> Tables:
    """Returns the blocks that a transfer may use. For a state this is only the block of the present state."""
    return tuple(
        present(blocks, rule.scratch_blocks) if rule.is_state else list(blocks)
        for rule, blocks in zip(rules, tables, strict=True)
    )


def present(blocks: Sequence[int], scratch_blocks: int) -> list[int]:
    """Returns the block of the present state: the last block before the blocks of speculative decoding."""
    end = len(blocks) - min(scratch_blocks, max(len(blocks) - 1, 0))
    return list(blocks[:end][-1:])


def covers(rules: Sequence[TableRule], tables: Sequence[Sequence[int]], tokens: int) -> bool:
    """Returns true if the tables have a block for each of the first `tokens` tokens, and for each state."""
    return all(
        len(blocks) >= (1 if rule.is_state else -(-tokens // rule.block_tokens))
        for rule, blocks in zip(rules, tables, strict=True)
    )


def blocks_of(tables: Sequence[Sequence[int]]) -> list[int]:
    """Returns all blocks of the tables, without null blocks."""
    return [block for blocks in tables for block in blocks if block != NULL_BLOCK]
