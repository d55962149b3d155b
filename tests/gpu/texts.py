"""Compares an answer with the answer of an instance that computes the whole prompt itself."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from harness.client import post_json

DTYPE = "float16"
"""The number format of models whose texts are compared.

bfloat16 rounds eight times more coarsely than float16. With bfloat16, rounding would decide one token in ten.
"""

TIE = 0.15
"""The largest difference of two tokens' log probabilities at which rounding may decide between the tokens.

Tensor parallelism, batches and chunks of prefill change the order of additions, so results differ in the last bits.
Compared with float32, the logits of these models change by 0.013 (standard deviation). On average the likeliest token
leads by 0.8.
"""

CANDIDATES = 10

_WORD = re.compile(r"w\d+")


class Match(enum.Enum):
    """The result of comparing an answer with its reference."""

    EQUAL = "equal"
    TIE = "equal up to a token that was as likely as the other"
    WRONG = "wrong"


@dataclass(frozen=True)
class Reference:
    """The answer of the instance, and the likeliest tokens at each position."""

    text: str
    candidates: list[dict[str, float]]
    """For each position, the log probability of each likely token, by the token's text."""

    def match(self, text: str) -> Match:
        """Compares a text up to its first different word. Later words depend on the first different word, so they prove
        nothing.
        """
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
    """Returns the greedy answer of the engine at `url`, without the proxy."""
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    choice = post_json(f"{url}/v1/completions", {**body, "logprobs": CANDIDATES})["choices"][0]
    places = choice["logprobs"]["top_logprobs"]
    candidates = [{word.strip(): value for word, value in place.items()} for place in places]
    return Reference("".join(choice["text"].split()), candidates)
