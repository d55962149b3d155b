"""Tests every field of vLLM's request models against the proxy's prefill leg. No engine runs.

A prefill leg asks for one token. The leg keeps the fields that determine the prompt, and leaves out the fields that
concern the generation. If a version of vLLM has a new field, the first test fails until the field is added to a list of
this file. If the leg must leave a new field out, add the field to proxy/src/openai/body/kinds.rs, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from harness.client import call
from harness.proxy import Proxy
from harness.scripted import JsonHandler, serving

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}]},
    COMPLETIONS: {"prompt": "hello"},
    MESSAGES: {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9},
    RESPONSES: {"input": "hello"},
}

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

# These fields determine the prompt, identify the user, or are for extensions of the engine: the leg contains them.
KEPT: dict[str, Any] = {
    "model": "m",
    "prompt": "hello",
    "messages": [{"role": "user", "content": "hi"}],
    "add_generation_prompt": False,
    "continue_final_message": False,
    "add_special_tokens": True,
    "documents": [{"title": "a", "text": "b"}],
    "chat_template": "{{ messages }}",
    "chat_template_kwargs": {"enable_thinking": False},
    "media_io_kwargs": {"video": {"num_frames": 4}},
    "mm_processor_kwargs": {"num_crops": 4},
    "tools": [TOOL],
    "tool_choice": "none",
    "reasoning_effort": "low",
    "truncate_prompt_tokens": 4,
    "truncation_side": "left",
    # The text after the gap of a completion. vLLM inserts it into the prompt of models that fill in the middle.
    "suffix": "return x",
    "priority": 1,
    "session_id": "s",
    "user": "u",
    "ec_transfer_params": {"a": 1},
    "vllm_xargs": {"a": 1},
    "system": "s",
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "low"},
    "input": "hi",
    "instructions": "s",
    "previous_input_messages": [{"role": "user", "content": "hi"}],
    "reasoning": {"effort": "low"},
    "truncation": "auto",
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "prompt_cache_key": "k",
}

# These fields concern the generation or the form of the answer.
LEFT_OUT: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1.0},
    "logprobs": 2,
    "top_logprobs": 2,
    "logprob_token_ids": [5],
    "max_tokens": 9,
    "max_completion_tokens": 9,
    "n": 1,
    "presence_penalty": 0.5,
    "seed": 7,
    "stop": ["x"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "thinking_token_budget": 5,
    "include_reasoning": False,
    "parallel_tool_calls": False,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "watermarking": True,
    "length_penalty": 1.5,
    "stop_token_ids": [5],
    "include_stop_str_in_output": True,
    "ignore_eos": False,
    "min_tokens": 3,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "allowed_token_ids": [5, 6],
    "bad_words": ["x"],
    "echo": True,
    "structured_outputs": {"regex": "a+"},
    "request_id": "mine",
    "return_tokens_as_token_ids": True,
    "return_token_ids": True,
    "routed_experts_prompt_start": 1,
    "return_token_offsets": True,
    "return_prompt_text": True,
    "mm_payload": "none",
    "return_mm_kwargs": False,
    "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
    "stream_interval": 2,
    "stop_sequences": ["x"],
    "max_output_tokens": 9,
    "max_tool_calls": 2,
    "include": ["message.output_text.logprobs"],
    "text": {"format": {"type": "text"}},
    "enable_response_messages": True,
    "store": True,
}

# A chat template may read this field. For a completion the field determines only the form of the answer.
BY_ENDPOINT: dict[str, Any] = {"response_format": {"type": "json_object"}}

# With one of these fields the proxy sends no prefill leg, or answers the client with 400.
NO_LEG: dict[str, Any] = {
    "use_beam_search": True,
    "prompt_logprobs": 1,
    "prompt_embeds": "AAAA",
    "cache_salt": "salt",
    "kv_transfer_params": {"do_remote_decode": True},
    "background": True,
    "previous_response_id": "resp_1",
}
# The same for fields of one endpoint. A chat with `echo` gets log probabilities of its prompt.
NO_LEG_OF = {CHAT: {"echo"}}

# Fields that have another form at these endpoints.
OTHER_FORM: dict[str, dict[str, Any]] = {
    MESSAGES: {
        "tools": [{"name": "f", "input_schema": {"type": "object", "properties": {}}}],
        "tool_choice": {"type": "auto"},
    },
    RESPONSES: {"tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}]},
}

# vLLM has this field, but refuses every value.
REFUSED = {RESPONSES: {"prompt"}}

# Some fields are valid only together with others.
BESIDE: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "logprob_token_ids": {"logprobs": 1},
    "top_logprobs": {"logprobs": True},
    "thinking": {"max_tokens": 2048},
}


@cache
def models() -> dict[str, Any]:
    """Returns vLLM's models of the requests. The import is in this function, because each worker collects this file
    and vLLM takes long to import.
    """
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    return {
        CHAT: ChatCompletionRequest,
        COMPLETIONS: CompletionRequest,
        MESSAGES: AnthropicMessagesRequest,
        RESPONSES: ResponsesRequest,
    }


@pytest.mark.parametrize("path", PROMPTS)
def test_every_field_is_sorted(path: str) -> None:
    sorted_fields = {*KEPT, *LEFT_OUT, *BY_ENDPOINT, *NO_LEG}
    new = set(models()[path].model_fields) - sorted_fields
    where = "proxy/src/openai/body/kinds.rs, and here"
    assert not new, f"{path}: decide whether a prefill leg carries {sorted(new)}: {where}"


@pytest.mark.parametrize("path", PROMPTS)
def test_a_prefill_leg_is_what_vllm_accepts(path: str, engine_in_name: tuple[Proxy, Seen]) -> None:
    from vllm.exceptions import VLLMValidationError

    proxy, seen = engine_in_name
    fields = set(models()[path].model_fields) - set(NO_LEG) - NO_LEG_OF.get(path, set()) - REFUSED.get(path, set())
    values = KEPT | LEFT_OUT | BY_ENDPOINT | OTHER_FORM.get(path, {})
    wrong = []
    for name in sorted(fields):
        body = PROMPTS[path] | BESIDE.get(name, {}) | {name: values[name]}
        if path == CHAT and name in ("logprobs", "logprob_token_ids"):
            body["logprobs"] = True
        accepted(path, body)
        seen.legs.clear()
        status, answer = call(f"{proxy.url}{path}", body)
        assert status == 200, (name, answer)
        limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
        (leg,) = [leg for leg in seen.legs if leg.get(limit) == 1 and "kv_transfer_params" in leg]
        try:
            accepted(path, leg)
        except (ValueError, VLLMValidationError) as error:
            wrong.append(f"{name}: vLLM refuses the leg: {str(error).splitlines()[-2:]}")
        is_kept = name in KEPT or (name in BY_ENDPOINT and path == CHAT)
        if is_kept and leg.get(name) != body[name]:
            wrong.append(f"{name}: the leg does not carry it")
        if not is_kept and name in leg and leg[name] == body[name]:
            wrong.append(f"{name}: the leg carries it")
    assert not wrong, "\n".join(wrong)


def accepted(path: str, body: dict[str, Any]) -> None:
    """Raises the error for which vLLM answers 400."""
    request = models()[path].model_validate(json.loads(json.dumps(body)))
    if path != MESSAGES:
        request.to_sampling_params(16, {})


class Seen:
    """The bodies that one scripted engine receives."""

    def __init__(self) -> None:
        self.legs: list[dict[str, Any]] = []


@pytest.fixture(scope="module")
def engine_in_name(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Seen]]:
    """Starts a proxy in front of two servers that answer as engines do."""
    seen = Seen()
    logs: Path = tmp_path_factory.mktemp("logs")
    with answering(seen) as prefill, answering(Seen()) as decode:
        proxy = Proxy(logs, ["--prefill", prefill, "--decode", decode, "--connector", "nixl"])
        proxy.start()
        try:
            proxy.wait_ready()
            yield proxy, seen
        finally:
            proxy.stop()


@contextmanager
def answering(seen: Seen) -> Iterator[str]:
    class Handler(JsonHandler):
        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            seen.legs.append(self.body())
            self.answer({"choices": [], "kv_transfer_params": {"do_remote_prefill": True}})

    with serving(Handler) as at:
        yield f"http://{at}"
