"""Which bytes of a request lie in which chunk, for layouts of one group and of several groups of layers.

Both sides and both languages use the same plan (see `protocol/src/plan.rs`); shared fixtures hold the two together.

The chunks of the tokens come first. A chunk of tokens contains, for each group, the group's tokens that the decode side
needs, packed one group after the other in the layout's order. After these chunks come the chunks of the state: the
states of all state groups form one sequence of bytes, which is cut into pieces of one slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pd_sidecar.sidecar.wire import slot_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pd_sidecar.sidecar.wire import Group


@dataclass(frozen=True)
class Part:
    """The part of a chunk that belongs to one group."""

    group: int
    """The index of the group in the layout."""
    tokens: tuple[int, int]
    """The tokens `[from, to)`; empty for state."""
    offset: int
    """The first byte in the slot."""
    bytes: int
    start: int = 0
    """For state: the first byte of this part in the group's state."""


class Plan:
    """The chunks of one request.

    The decode side computes token `tokens` next (the position r), and already has the first `have` tokens.
    """

    def __init__(self, groups: Sequence[Group], chunk_tokens: int, *, tokens: int, have: int) -> None:
        self._groups = groups
        self._chunk_tokens = chunk_tokens
        self.tokens = tokens
        self.have = have
        self.token_chunks = -(-tokens // chunk_tokens)
        """The number of chunks of tokens."""
        self.slot_bytes = slot_bytes(groups, chunk_tokens)
        self._state_bytes = sum(group.bytes for group in groups if group.kind == "state") if tokens else 0

    @property
    def chunks(self) -> int:
        """The number of chunks, including the chunks of the state."""
        return self.token_chunks + self.state_chunks

    @property
    def state_chunks(self) -> int:
        """The number of chunks of the state."""
        return -(-self._state_bytes // self.slot_bytes) if self._state_bytes else 0

    def is_state(self, chunk: int) -> bool:
        """Returns true for a chunk of the state."""
        return chunk >= self.token_chunks

    def parts(self, chunk: int) -> list[Part]:
        """Returns the non-empty parts of a chunk, in the order of the slot."""
        if self.have >= self.tokens:
            return []
        return self._state_parts(chunk - self.token_chunks) if self.is_state(chunk) else self._token_parts(chunk)

    def size(self, chunk: int) -> int:
        """Returns the bytes of a chunk."""
        return sum(part.bytes for part in self.parts(chunk))

    def wanted(self) -> list[int]:
        """Returns the chunks that are not empty."""
        return [chunk for chunk in range(self.chunks) if self.parts(chunk)]

    @property
    def bytes(self) -> int:
        """The bytes of all chunks."""
        return sum(map(self.size, range(self.chunks)))

    def needs(self, chunk: int) -> int:
        """Returns the number of tokens that must be computed before the chunk is complete. The state is complete when
        exactly this number of tokens is computed.
        """
        return self.tokens if self.is_state(chunk) else min((chunk + 1) * self._chunk_tokens, self.tokens)

    def first_token(self, group: Group) -> int:
        """Returns the first token of which the decode side needs this group's KV."""
        if group.kind == "window":
            return max(self.have, self.tokens - group.size + 1)
        if group.kind == "chunked":
            return max(self.have, self.tokens // group.size * group.size)
        return self.have

    def _token_parts(self, chunk: int) -> list[Part]:
        parts, offset = [], 0
        end = self.needs(chunk)
        for index, group in enumerate(self._groups):
            start = max(chunk * self._chunk_tokens, self.first_token(group))
            if group.kind == "state" or start >= end:
                continue
            size = (end - start) * group.bytes
            parts.append(Part(index, (start, end), offset, size))
            offset += size
        return parts

    def _state_parts(self, piece: int) -> list[Part]:
        parts, before = [], 0
        first, last = piece * self.slot_bytes, (piece + 1) * self.slot_bytes
        for index, group in enumerate(self._groups):
            if group.kind != "state":
                continue
            start, end = max(first, before), min(last, before + group.bytes)
            if start < end:
                parts.append(Part(index, (0, 0), start - first, end - start, start - before))
            before += group.bytes
        return parts
