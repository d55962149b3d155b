"""Makes prompts of exact lengths, as token ids."""

from __future__ import annotations

import random

from harness.model import VOCABULARY

# Lower ids are special tokens.
FIRST_TOKEN = 2


def prompt(tokens: int, seed: int) -> list[int]:
    """Returns random tokens; the same arguments give the same tokens."""
    draw = random.Random(f"{tokens}/{seed}")
    return [draw.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(tokens)]


# The lengths are just below and above a block (32 and 64 tokens), just below and above a chunk and a step of chunked
# prefill (both 256 tokens), and some large lengths.
LENGTHS = (1, 2, 31, 50, 64, 65, 255, 256, 257, 300, 511, 777, 1024, 1500)
