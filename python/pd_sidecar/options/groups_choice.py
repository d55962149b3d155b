"""Decides whether an engine may start with several KV groups.

Where the hand-over of several groups is not tested enough, the user must ask for it. Otherwise the engine does not
start: an engine that computes all prompts itself, or whose failed loads nobody has seen, would be found too late.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import MambaSpec

from pd_sidecar.options.config import ConfigError
from pd_sidecar.options.versions import HAS_REPORTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec


def has_several(groups: Sequence[KVCacheGroupSpec]) -> bool:
    """Returns true for more than one of vLLM's KV cache groups."""
    return len(groups) > 1


def check_groups(groups: Sequence[KVCacheGroupSpec], vllm_config: VllmConfig, *, is_allowed: bool) -> None:
    """Raises `ConfigError` if the user must ask for this model's groups and has not, or if this version of vLLM would
    give wrong texts.
    """
    if not has_several(groups):
        return
    if not is_allowed and (current_platform.is_cuda_alike() or not HAS_REPORTS):
        raise ConfigError(
            [
                f"this model has {len(groups)} KV groups, and their hand-over is not tested enough on GPUs: set "
                "allow_several_groups to true in kv_connector_extra_config of both sides, or start both sides with "
                "--disable-hybrid-kv-cache-manager, which needs more memory and serves no models with states"
            ]
        )
    specs = [
        spec
        for group in groups
        for spec in getattr(group.kv_cache_spec, "kv_cache_specs", {0: group.kv_cache_spec}).values()
    ]
    has_states = any(isinstance(spec, MambaSpec) for spec in specs)
    if has_states and not HAS_REPORTS and vllm_config.cache_config.enable_prefix_caching:
        # With a connector, vLLM 0.24 takes the longest prefix that any group has in its cache, and computes on from
        # there, also if the states at this place are not in the cache and the connector brings none.
        raise ConfigError(
            [
                "this version of vLLM continues from cached tokens without their states, for each request that this "
                "connector does not load: start the engine with --no-enable-prefix-caching"
            ]
        )
