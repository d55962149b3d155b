"""Makes chunks with known content, for every kind of peer."""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass, replace

from pd_sidecar.sidecar.wire import Layout

LAYOUT = Layout("m", "float", layers=2, kv_heads=2, head_size=16, mla=False, chunk_tokens=256)
CHUNK_TOKENS = LAYOUT.chunk_tokens
TOKEN_BYTES = LAYOUT.chunk_bytes // CHUNK_TOKENS

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Prompt:
    """The KV of a prompt. `seed` determines the content of the chunks, and `name` determines their keys."""

    name: int
    tokens: int
    seed: int
    # The rank to which this part of the KV belongs, and the number of ranks.
    rank: int = 0
    ranks: int = 1

    @classmethod
    def of_chunks(cls, chunks: int, last: int = CHUNK_TOKENS) -> Prompt:
        """Returns a new prompt, different from all others. The last chunk of the prompt has `last` tokens."""
        number = next(_numbers)
        return cls(number, (chunks - 1) * CHUNK_TOKENS + last if chunks else 0, number)

    def of_rank(self, rank: int, ranks: int) -> Prompt:
        """Returns the same prompt with the part of the KV that belongs to one rank."""
        return replace(self, seed=self.seed * 1000 + rank, rank=rank, ranks=ranks)

    @property
    def chunks(self) -> int:
        return -(-self.tokens // CHUNK_TOKENS)

    @property
    def keys(self) -> list[str]:
        """Returns the keys of the chunks in LMCache's format. The hashes in the keys are arbitrary numbers."""
        return [f"m@{self.ranks}@{self.rank}@{(self.name << 16) + i:x}@float" for i in range(self.chunks)]

    def chunk(self, index: int) -> bytes:
        count = min(CHUNK_TOKENS, self.tokens - index * CHUNK_TOKENS)
        return random.Random(f"{self.seed}-{index}").randbytes(count * TOKEN_BYTES)

    @property
    def sums(self) -> list[str]:
        return [sum_of(self.chunk(i)) for i in range(self.chunks)]


def sum_of(data: bytes | memoryview) -> str:
    return hashlib.sha1(data).hexdigest()
