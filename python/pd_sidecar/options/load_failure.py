"""vLLM's policy for failed loads: `kv_load_failure_policy`. This connector needs `recompute`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm.config.kv_transfer import KVTransferConfig

logger = init_logger("vllm.pd_sidecar.connector")


def policy(transfer: KVTransferConfig) -> str:
    """Returns the load-failure policy that will apply. The scheduler's half sets `recompute` if it can.

    vLLM reads only the outermost configuration. A child of a MultiConnector has a configuration of its own, so it
    cannot change the policy.
    """
    parent = _parent()
    if parent is None:
        return "recompute"
    outer = parent._vllm_config.kv_transfer_config
    policies = {transfer.kv_load_failure_policy, outer.kv_load_failure_policy if outer is not None else "fail"}
    return "recompute" if policies == {"recompute"} else "fail"


def set_recompute(transfer: KVTransferConfig) -> None:
    """Sets the policy before vLLM's scheduler reads it, which it does after it has made its connector."""
    if transfer.kv_load_failure_policy != "recompute":
        logger.info(
            "kv_load_failure_policy is %r, which answers HTTP 500 when KV does not arrive; set to 'recompute'",
            transfer.kv_load_failure_policy,
        )
        transfer.kv_load_failure_policy = "recompute"


def _parent() -> MultiConnector | None:
    """Returns the MultiConnector that makes this connector; otherwise `None`.

    vLLM tells a child nothing about its parent, so this function looks for the parent among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), MultiConnector):
            return caller
        frame = frame.f_back
    return None
