"""An answer against what an instance says that computes all of its prompt."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from harness.client import post_json

DTYPE = "float16"
"""Of models whose texts are compared. bfloat16 rounds eight times as coarsely: there roundings would decide one token
in ten."""

TIE = 0.15
"""How much likelier the one of two tokens may be, as a logarithm, for roundings to decide between them: what tensor
parallelism, a batch or a chunk of prefill adds up in another order differs in the last bits. Against float32 they move
the logits of these models by 0.013 (standard deviation); the likeliest token leads by 0.8 on average."""

CANDIDATES = 10

_WORD = re.compile(r"w\d+")


class Match(enum.Enum):
    """Of an answer with its reference."""

    EQUAL = "equal"
    TIE = "equal up to a token that was as likely as the other"
    WRONG = "wrong"


@dataclass(frozen=True)
class Reference:
    """What the instance says, and the likeliest tokens at each place."""

    text: str
    candidates: list[dict[str, float]]
    """By its word, the logarithm of each one's probability."""

    def match(self, text: str) -> Match:
        """How a text compares. After its first different word nothing can be said of it."""
        text = "".join(text.split())
        if text == self.text:
            return Match.EQUAL
        words, own = _WORD.findall(text), _WORD.findall(self.text)
        for said, expected, candidates in zip(words, own, self.candidates, strict=False):
            if said != expected:
                near = said in candidates and candidates[expected] - candidates[said] <= TIE
                return Match.TIE if near else Match.WRONG
        return Match.WRONG


def reference(url: str, prompt: list[int], tokens: int) -> Reference:
    """The greedy answer of the engine at `url`, asked directly."""
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    choice = post_json(f"{url}/v1/completions", {**body, "logprobs": CANDIDATES})["choices"][0]
    places = choice["logprobs"]["top_logprobs"]
    candidates = [{word.strip(): value for word, value in place.items()} for place in places]
    return Reference("".join(choice["text"].split()), candidates)
