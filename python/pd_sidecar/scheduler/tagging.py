"""Decides which tags the keys of a request's chunks get for its adapter and its salt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pd_sidecar.kv.tags import adapter_tag, salt_tag
from pd_sidecar.scheduler.eligibility import Skip

if TYPE_CHECKING:
    from vllm.v1.request import Request


def untagged(request: Request) -> Skip | None:
    """Returns the reason why this request cannot use KV under keys without tags, such as KV from LMCache: KV without a
    tag can belong to the same tokens with another salt or adapter. Returns `None` if the KV depends on the tokens
    alone.
    """
    if request.lora_request is not None:
        return Skip.LORA
    return Skip.CACHE_SALT if request.cache_salt is not None else None


def tags_of(request: Request, adapter: str, chunks: int) -> list[str]:
    """Returns the tags of each chunk's key; an empty list if the KV depends on the tokens alone. `adapter` is the
    digest of the LoRA adapter's files.
    """
    tags = ""
    if request.lora_request is not None:
        tags += adapter_tag(request.lora_request.lora_name, adapter)
    if request.cache_salt is not None:
        tags += salt_tag(request.cache_salt)
    return [tags] * chunks if tags else []
