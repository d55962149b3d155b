"""Prompts as token ids, of exact lengths."""

from __future__ import annotations

import random

from harness.model import VOCABULARY

# Ids below are special tokens.
FIRST_TOKEN = 2


def prompt(tokens: int, seed: int) -> list[int]:
    """Random tokens, the same for the same arguments."""
    draw = random.Random(f"{tokens}/{seed}")
    return [draw.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(tokens)]


# Around the edges of a block (32 and 64), of a chunk (256), of a step of chunked prefill (256), and long ones.
LENGTHS = (1, 2, 31, 50, 64, 65, 255, 256, 257, 300, 511, 777, 1024, 1500)
