"""Decides which tags the keys of a request's chunks get for its adapter, its salt and its images."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from pd_sidecar.kv.tags import adapter_tag, media_tag, salt_tag
from pd_sidecar.scheduler.eligibility import Skip

if TYPE_CHECKING:
    from vllm.v1.request import Request


def untagged(request: Request) -> Skip | None:
    """Returns the reason why this request cannot use KV under keys without tags, such as KV from LMCache: KV without a
    tag can belong to the same tokens with another salt, adapter or image. Returns `None` if the KV depends on the
    tokens alone.
    """
    if request.lora_request is not None:
        return Skip.LORA
    if request.mm_features:
        return Skip.MULTIMODAL
    return Skip.CACHE_SALT if request.cache_salt is not None else None


def tags_of(request: Request, adapter: str, chunks: int, chunk_tokens: int) -> list[str]:
    """Returns the tags of each chunk's key; an empty list if the KV depends on the tokens alone. `adapter` is the
    digest of the LoRA adapter's files.
    """
    tags, media = "", request.mm_features
    if request.lora_request is not None:
        tags += adapter_tag(request.lora_request.lora_name, adapter)
    if request.cache_salt is not None:
        tags += salt_tag(request.cache_salt)
    if not media:
        return [tags] * chunks if tags else []
    items = sorted((each.mm_position.offset, each.identifier, each.mm_position.length) for each in media)
    # An image changes the KV of its first token and of all later tokens, so earlier chunks do not depend on it.
    offsets = [offset for offset, _, _ in items]
    counts = [bisect_left(offsets, end * chunk_tokens) for end in range(1, chunks + 1)]
    of_count = {
        count: media_tag([(name, offset, length) for offset, name, length in items[:count]]) if count else ""
        for count in set(counts)
    }
    return [tags + of_count[count] for count in counts]
