"""Cuts the prompt of a prefill leg, for models with a window or a state.

The decode side computes the last prompt token itself, and needs the window or the state before this token. If the
prefill side computed the token too, vLLM would free the first block of the window for some prompt lengths, and the
state would be one token too far. vLLM's own NixlConnector cuts the prompt in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request


def truncate(request: Request, tokens: int) -> None:
    """Cuts the request to its first `tokens` prompt tokens, and to one token of output: the KV must not grow beyond
    what the decode side needs. The output means nothing if the prompt is cut.
    """
    request.max_tokens = 1
    beyond = request.num_prompt_tokens - tokens
    if beyond <= 0 or request.prompt_token_ids is None:
        return
    del request.prompt_token_ids[-beyond:]
    del request._all_token_ids[-beyond:]
    request.num_prompt_tokens -= beyond


def media_beyond(request: Request, tokens: int) -> bool:
    """Returns true if an image, audio or video lies partly after the first `tokens` tokens, so that the prompt cannot
    be cut there.
    """
    return any(each.mm_position.offset + each.mm_position.length > tokens for each in request.mm_features)
