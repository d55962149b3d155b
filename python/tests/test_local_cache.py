"""Tests with vLLM's own managers of KV blocks: no block that a load fills only in part stays in the prefix cache."""

from __future__ import annotations

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheConfig, KVCacheGroupSpec, get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.request import Request

from pd_sidecar.options.versions import SupportsGroups
from pd_sidecar.scheduler.local_cache import LocalCache
from pd_sidecar.scheduler.tables import TableRule, table_rules

BLOCK, WINDOW = 16, 24
pytestmark = pytest.mark.skipif(SupportsGroups is object, reason="this version of vLLM keeps one group")


class Engine:
    def __init__(self):
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        sizes = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
        groups = [
            KVCacheGroupSpec(["full"], FullAttentionSpec(**sizes)),
            KVCacheGroupSpec(["window"], SlidingWindowSpec(**sizes, sliding_window=WINDOW)),
        ]
        self.manager = KVCacheManager(KVCacheConfig(200, [], groups), 4096, BLOCK, BLOCK)
        self.cache = LocalCache(table_rules(groups, BLOCK), is_on=True)
        self.cache.bind(self.manager)

    def request(self, name, tokens):
        return Request(name, tokens, SamplingParams(max_tokens=1), None, block_hasher=self.hasher)

    def load(self, tokens, *, excludes=True):
        """Loads all tokens but the last, as a decode side does, and ends the request."""
        request = self.request("a", tokens)
        blocks, have, *_ = self.manager.get_computed_blocks(request)
        resumed = len(tokens) - 1
        assert self.manager.allocate_slots(
            request, 0, have, blocks, num_external_computed_tokens=resumed - have, delay_cache_blocks=True
        )
        if excludes:
            self.cache.exclude_partial(request.request_id, have, resumed)
        self.manager.cache_blocks(request, resumed)
        request.num_computed_tokens = resumed
        self.manager.free(request)
        return have

    def hit(self, tokens):
        return self.manager.get_computed_blocks(self.request("b", tokens))[1]


def first_of(position):
    """Returns the first token that the window of a token at this position contains."""
    return max(0, position - WINDOW + 1)


@pytest.mark.parametrize("n", range(2, 120))
def test_no_prefix_hit_needs_a_token_that_was_not_loaded(n):
    tokens = list(range(n))
    for shared in range(BLOCK, n, BLOCK):
        engine = Engine()
        engine.load(tokens)
        hit = engine.hit(tokens[:shared] + [9999] * 40)
        assert hit == 0 or first_of(hit) >= first_of(n - 1), (n, shared, hit)


def test_without_the_exclusion_a_hit_needs_tokens_that_were_not_loaded():
    tokens = list(range(37))
    engine = Engine()
    engine.load(tokens, excludes=False)
    hit = engine.hit(tokens[:32] + [9999] * 40)
    assert hit == 32 and first_of(hit) < first_of(36)


def test_the_prefix_that_ends_with_a_load_stays_in_the_cache():
    """A second turn begins with this prefix."""
    tokens = list(range(1 + 5 * BLOCK))
    engine = Engine()
    engine.load(tokens)
    more = [*tokens, *[9999] * 40]
    assert engine.hit(more) == 5 * BLOCK
    assert engine.load(more) == 5 * BLOCK
    assert engine.hit([*more, 9999]) in (0, 5 * BLOCK)


def test_a_vllm_with_other_managers_loads_no_windows():
    windows, full = (LocalCache([TableRule(BLOCK, is_partial=is_partial)], is_on=True) for is_partial in (True, False))
    windows.bind(object())
    assert not windows.is_safe
    assert full.is_safe
    # Without a prefix cache no block can be found by another prompt.
    uncached = LocalCache([TableRule(BLOCK, is_partial=True)], is_on=False)
    uncached.bind(object())
    assert uncached.is_safe
    uncached.exclude_partial("a", 0, 10)
