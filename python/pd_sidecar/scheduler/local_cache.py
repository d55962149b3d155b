"""Keeps blocks that a load fills only in part out of vLLM's prefix cache.

A load moves exactly the tokens inside a window. Usually the window begins in the middle of a block, and the block's
earlier tokens are not loaded. vLLM believes that a load fills whole blocks, so it would put the block into its prefix
cache. A later prompt that shares only the beginning of the tokens would then read the tokens that were never loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pd_sidecar.scheduler.tables import TableRule


class LocalCache:
    """The managers of vLLM's groups, which decide what the prefix cache contains."""

    def __init__(self, rules: Sequence[TableRule], *, is_on: bool) -> None:
        self._is_on = is_on
        self._windows = [index for index, rule in enumerate(rules) if rule.is_partial and not rule.is_state]
        self._rules = rules
        self._managers: Sequence[Any] = ()

    def bind(self, kv_cache_manager: Any) -> None:
        """Takes vLLM's managers. Call this before the first load."""
        coordinator = getattr(kv_cache_manager, "coordinator", None)
        managers = tuple(getattr(coordinator, "single_type_managers", ()))
        if len(managers) == len(self._rules) and all(_is_known(managers[index]) for index in self._windows):
            self._managers = managers

    @property
    def has_windows(self) -> bool:
        """True if a group has windows or chunks of local attention."""
        return bool(self._windows)

    @property
    def is_safe(self) -> bool:
        """False if this version of vLLM has other managers, so that a load could leave wrong blocks in the cache."""
        return not self._is_on or not self._windows or bool(self._managers)

    def exclude_partial(self, engine_id: str, have_tokens: int, tokens: int) -> None:
        """Excludes the block that a load up to token `tokens` fills only in part. `have_tokens` tokens are here
        already. Call this when the blocks are allocated: vLLM puts them into the cache when the load is over.
        """
        for index in self._windows if self._managers else ():
            manager, block_tokens = self._managers[index], self._rules[index].block_tokens
            first = max(have_tokens, manager.get_num_skipped_tokens(tokens))
            block = first // block_tokens
            # The block may stay if the shortest prefix that needs the block does not need the missing tokens. A shorter
            # prefix needs a block before this one, and these are null blocks.
            shortest = (block + 1) * block_tokens
            while manager.get_num_skipped_tokens(shortest) // block_tokens < block:
                shortest += block_tokens
            if manager.get_num_skipped_tokens(shortest) < first:
                cached = manager.num_cached_block
                cached[engine_id] = max(cached.get(engine_id, 0), block + 1)


def _is_known(manager: Any) -> bool:
    return isinstance(getattr(manager, "num_cached_block", None), dict) and hasattr(manager, "get_num_skipped_tokens")
