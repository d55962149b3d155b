"""Makes the tags of chunk keys: `@tag%value` for what decides KV beside the tokens.

Keys of requests for which only the tokens count have no tags, and so the bytes of LMCache's keys. Two requests whose
tags differ never have a key in common. A value is a digest of 128 bits: keys stand in messages and logs, where a salt
must not appear.
"""

from __future__ import annotations

import hashlib


def salt_tag(salt: str) -> str:
    """Returns the tag of a `cache_salt`."""
    return f"@salt%{_digest('salt', salt)}"


def adapter_tag(name: str, weights: str) -> str:
    """Returns the tag of a LoRA adapter. vLLM's own block hashes tell adapters apart by name; `weights` is a digest of
    the adapter's files.
    """
    return f"@lora%{_digest('lora', name, weights)}"


def _digest(*parts: str) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        # The length keeps the parts apart: ("ab", "c") is not ("a", "bc").
        hasher.update(len(data).to_bytes(8, "big") + data)
    return hasher.hexdigest()[:DIGITS]


DIGITS = 32
"""The hexadecimal digits of a tag's value."""
