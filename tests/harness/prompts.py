"""Makes prompts: token ids of exact lengths, and chats with images."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

from harness.model import VOCABULARY

# Lower ids are special tokens.
FIRST_TOKEN = 2


def prompt(tokens: int, seed: int) -> list[int]:
    """Returns random tokens; the same arguments give the same tokens."""
    draw = random.Random(f"{tokens}/{seed}")
    return [draw.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(tokens)]


def image(seed: int) -> dict[str, Any]:
    """Returns a content part with an image of random pixels."""
    # Import it here: programs that run without vLLM's environment use this module, too.
    from PIL import Image

    pixels = random.Random(seed).randbytes(3 * 40 * 40)
    out = io.BytesIO()
    Image.frombytes("RGB", (40, 40), pixels).save(out, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"},
    }


def chat(*parts: dict[str, Any] | str, **more: Any) -> dict[str, Any]:
    """Returns the body of a chat whose only message has these parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {
        "model": "m",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


# The lengths are just below and above a block (32 and 64 tokens), just below and above a chunk and a step of chunked
# prefill (both 256 tokens), and some large lengths.
LENGTHS = (1, 2, 31, 50, 64, 65, 255, 256, 257, 300, 511, 777, 1024, 1500)
