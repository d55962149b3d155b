"""Makes LMCache's chunk keys: `model@world_size@rank@hash@dtype`, followed by the chunk's tags, if there are any.

The hash of a chunk covers all tokens up to the chunk's end: `h[i] = f((h[i-1], tokens, ()))`. The partial last chunk
has a hash, too. `h[-1]` depends on `PYTHONHASHSEED`, as in vLLM from 0.32 on.
"""

from __future__ import annotations

import array
import hashlib
import os
import pickle
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SEED_VARIABLE = "PYTHONHASHSEED"
ALGORITHMS = ("sha256_cbor", "sha256_cbor_64bit", "sha256", "builtin")
"""The algorithms under LMCache's names; the second name is an older name of the first algorithm."""
UNSEEDED = "vllm-none-hash"
"""The text that vLLM 0.32 hashes in place of an absent seed."""


class HashError(ValueError):
    """The configuration does not allow a chunk hash. The text names a setting that would allow a hash."""


class ChunkHasher:
    """The hash chain of a prompt's chunks."""

    def __init__(self, algorithm: str, chunk_tokens: int, environ: Mapping[str, str] = os.environ) -> None:
        """Checks the algorithm. Raises `HashError` for an unknown algorithm, or for `builtin` without a seed."""
        if chunk_tokens <= 0:
            raise HashError(f"chunk_tokens must be positive, not {chunk_tokens}")
        self.chunk_tokens = chunk_tokens
        self._hash = _algorithm(algorithm, environ)
        # Encode all tokens at once: cbor2 takes 4 ms for 16,000 tokens, and the engine must hash a prompt before its
        # prefill.
        self._encoded = algorithm == "sha256_cbor"
        if self._encoded:
            from cbor2 import dumps

            self._dumps: Callable[[object], bytes] = dumps
        self._origin = self._hash(environ.get(SEED_VARIABLE, UNSEEDED))

    def chain(self, tokens: Sequence[int]) -> list[str]:
        """Returns one hash per chunk, in order, in the form that keys use: hexadecimal without padding."""
        step = self.chunk_tokens
        previous = self._origin
        out: list[str] = []
        if self._encoded and (bodies := _cbor_arrays(tokens, step)) is not None:
            for body in bodies:
                previous = _first_eight(b"\x83" + self._dumps(previous) + body + b"\x80")
                out.append(f"{previous:x}")
            return out
        for start in range(0, len(tokens), step):
            previous = self._hash((previous, tuple(tokens[start : start + step]), ()))
            out.append(f"{previous:x}")
        return out


def refusal(algorithm: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns the reason why this algorithm cannot make keys; `None` if it can."""
    if algorithm not in ALGORITHMS:
        return f"hash algorithm {algorithm!r} is not one of sha256_cbor, sha256, builtin"
    if algorithm == "builtin" and environ.get(SEED_VARIABLE, "random") == "random":
        return (
            f"hash algorithm builtin needs {SEED_VARIABLE}: without it each process computes other hashes, and no key "
            "ever matches; set it, or use sha256_cbor"
        )
    return None


def keys(
    model: str, world_size: int, rank: int, hashes: Sequence[str], dtype: str, tags: Sequence[str] = ()
) -> list[str]:
    """Returns the keys of one rank's chunks. `tags` has one text per chunk (see `kv.tags`); it is empty if no chunk has
    a tag.
    """
    head, tail = f"{model}@{world_size}@{rank}@", f"@{dtype}"
    if not tags:
        return [f"{head}{value}{tail}" for value in hashes]
    return [f"{head}{value}{tail}{tag}" for value, tag in zip(hashes, tags, strict=True)]


def state_keys(token_keys: Sequence[str], chunks: int) -> list[str]:
    """Returns the keys of the chunks of a state. The state depends on all tokens, so the keys have the last token
    chunk's hash.
    """
    return [f"{token_keys[-1]}@state%{index}" for index in range(chunks)]


def _algorithm(name: str, environ: Mapping[str, str]) -> Callable[[object], int]:
    why = refusal(name, environ)
    if why is not None:
        raise HashError(why)
    if name == "sha256":
        return _sha256
    return hash if name == "builtin" else _sha256_cbor()


def _sha256_cbor() -> Callable[[object], int]:
    from cbor2 import dumps  # vLLM depends on it

    def function(value: object) -> int:
        return _first_eight(dumps(value, canonical=True))

    return function


def _cbor_arrays(tokens: Sequence[int], step: int) -> list[bytes] | None:
    """Returns the canonical CBOR of the tokens, in arrays of `step` tokens; `None` if a token is not a 32-bit
    number.
    """
    try:
        numbers = np.frombuffer(array.array("I", tokens), dtype=np.uint32)
    except (OverflowError, TypeError):
        return None
    # In CBOR a number has one head byte, and then 0, 1, 2 or 4 bytes (0 if the number is below 24).
    one, two, four = numbers >= 24, numbers >= 1 << 8, numbers >= 1 << 16
    cells = np.empty((numbers.size, 5), dtype=np.uint8)
    cells[:, 0] = np.where(one, 24 + two.view(np.uint8) + four, numbers)
    cells[:, 1:] = numbers.astype(">u4").view(np.uint8).reshape(-1, 4)
    kept = np.stack([np.ones_like(one), four, four, two, one], axis=1)
    starts = np.zeros(numbers.size + 1, dtype=np.int64)
    np.cumsum(1 + one.view(np.uint8) + two + 2 * four.view(np.uint8), out=starts[1:])
    data = np.compress(kept.reshape(-1), cells.reshape(-1))
    whole = data.tobytes()
    bodies = []
    for start in range(0, numbers.size, step):
        end = min(start + step, numbers.size)
        count = end - start
        if count < 24:
            head = bytes([0x80 + count])
        elif count < 1 << 8:
            head = bytes([0x98, count])
        elif count < 1 << 16:
            head = b"\x99" + count.to_bytes(2, "big")
        else:
            return None
        bodies.append(head + whole[starts[start] : starts[end]])
    return bodies


def _sha256(value: object) -> int:
    return _first_eight(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))


def _first_eight(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
