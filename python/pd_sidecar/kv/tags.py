"""Makes the tags of chunk keys, `@tag%value`. A tag stands for an input of the KV other than the tokens, such as a
salt, an adapter or an image.

If a request's KV depends on its tokens only, its keys have no tags, and are byte for byte LMCache's keys. Two requests
whose tags differ never have a key in common. A value is a digest of 128 bits, because keys appear in messages and logs,
where a salt must not appear.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def salt_tag(salt: str) -> str:
    """Returns the tag of a `cache_salt`."""
    return f"@salt%{_digest('salt', salt)}"


def adapter_tag(name: str, weights: str) -> str:
    """Returns the tag of a LoRA adapter. vLLM's own block hashes distinguish adapters by name only; `weights` is a
    digest of the adapter's files.
    """
    return f"@lora%{_digest('lora', name, weights)}"


def media_tag(items: Sequence[tuple[str, int, int]]) -> str:
    """Returns the tag of images, audio and video. An item has vLLM's identifier, and the position and number of the
    tokens that stand for it. These tokens are equal for all images of one size.
    """
    return f"@mm%{_digest('mm', *(str(field) for item in items for field in item))}"


def _digest(*parts: str) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        # Hash the length of each part, so that ("ab", "c") and ("a", "bc") have different digests.
        hasher.update(len(data).to_bytes(8, "big") + data)
    return hasher.hexdigest()[:DIGITS]


DIGITS = 32
"""The number of hexadecimal digits of a tag's value."""
