"""The requests of a load: conversations of one or more turns, with lengths in tokens or with texts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BLOCK_TOKENS = 512
"""Tokens of a block of Mooncake's traces."""


class BadInputError(Exception):
    """An argument or a file that cannot be used. The text names the place and what would be right."""


@dataclass(frozen=True)
class Span:
    """A length in tokens, chosen evenly between two limits, which both can be chosen."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """Reads `1000` or `500:2000`. Raises `ValueError`."""
        low, colon, high = text.partition(":")
        span = cls(int(low), int(high) if colon else int(low))
        if not 0 <= span.low <= span.high:
            raise ValueError(text)
        return span

    def choose(self, chance: random.Random) -> int:
        return chance.randint(self.low, self.high)


@dataclass(frozen=True)
class Block:
    """A part of a prompt. Blocks with an equal `name` have equal tokens, so servers can reuse their KV."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Turn:
    """One message of the user: either blocks of token ids, or a text."""

    answer_tokens: int
    blocks: tuple[Block, ...] = ()
    text: str = ""

    @property
    def tokens(self) -> int:
        """The length of the message in tokens, estimated for a text."""
        return sum(block.tokens for block in self.blocks) if self.blocks else estimated_tokens(self.text)


@dataclass(frozen=True)
class Conversation:
    """Turns that follow each other. Each turn's prompt has all earlier turns and answers before it."""

    turns: tuple[Turn, ...]
    at_s: float | None = None
    """Time of the first turn in a trace, in seconds since its begin. None: the load's arrivals decide."""

    system: str = ""
    """Text that comes before the first turn; only with texts."""

    @property
    def longest(self) -> int:
        """The length of the last turn's prompt with its answer, in tokens, estimated for texts."""
        return estimated_tokens(self.system) + sum(turn.tokens + turn.answer_tokens for turn in self.turns)


def estimated_tokens(text: str) -> int:
    """Returns about the number of tokens of a text: tokenizers make one token of about four characters."""
    return -(-len(text) // 4)


@dataclass(frozen=True)
class Synthetic:
    """Conversations of random tokens."""

    prompt: Span
    answer: Span
    turns: Span = field(default_factory=lambda: Span(1, 1))
    later: Span = field(default_factory=lambda: Span(100, 100))
    """The length of each message after the first."""

    shared: int = 0
    """Tokens at the beginning of all first prompts that are equal, as a system prompt is."""

    def conversations(self, seed: int) -> Iterator[Conversation]:
        """Yields conversations without an end. An equal seed gives equal lengths."""
        chance, number = random.Random(seed), 0
        while True:
            turns = []
            for turn in range(max(1, self.turns.choose(chance))):
                tokens = max(1, (self.later if turn else self.prompt).choose(chance))
                blocks = [Block(f"own-{number}-{turn}", tokens)]
                if turn == 0 and self.shared:
                    shared = min(self.shared, tokens - 1)
                    blocks = [Block("shared", shared), Block(f"own-{number}-0", tokens - shared)]
                turns.append(Turn(max(1, self.answer.choose(chance)), tuple(blocks)))
            yield Conversation(tuple(turns))
            number += 1


def token_ids(blocks: Sequence[Block], seed: str, ids: Span) -> list[int]:
    """Returns the tokens of blocks. Each server and run has its own `seed`, and finds no other's KV in a cache."""
    tokens: list[int] = []
    for block in blocks:
        chance = random.Random(f"{seed}/{block.name}")
        tokens += chance.choices(range(ids.low, ids.high + 1), k=block.tokens)
    return tokens
