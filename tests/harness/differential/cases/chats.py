"""Cases of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from harness.differential.case import ABSENT, Case, row, table, wrong
from harness.differential.cases.values import SCHEMA, TOOL, TOOLS, UNICODE, WRONG
from harness.prompts import image

PATH = "/v1/chat/completions"


def _says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


BASE: dict[str, Any] = {"model": "m", "messages": [_says("user", "list files")], "max_tokens": 6, "temperature": 0}
CALL = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"a": true}'}}
NAMED = {"type": "function", "function": {"name": "read"}}

ROWS = (
    row(),
    row(model=ABSENT),
    row(model="lora", alone="any", single=True),
    row(model="nobody"),
    row(messages=[]),
    row(messages=ABSENT),
    row(messages="hello"),
    row(messages=[_says("system", "Be brief."), _says("user", "hi"), _says("assistant", "yes"), _says("user", "so?")]),
    row(messages=[_says("developer", "Be brief."), _says("user", "hi")]),
    row(messages=[_says("pirate", "arr")]),
    row(messages=[_says("", "nobody")]),
    row(messages=[{"content": "no role"}]),
    row(messages=[{"role": "user"}]),
    row(messages=[_says("user", None)]),
    row(messages=[_says("user", "")]),
    row(messages=[_says("user", UNICODE)]),
    row(messages=[_says("user", [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])]),
    row(messages=[_says("user", [])]),
    row(messages=[_says("user", [{"type": "nothing"}])]),
    row(messages=[_says("user", [{"type": "text"}])]),
    row(messages=[_says("user", 5)]),
    # If two requests with one image come at the same time, vLLM 0.32 may answer one of them with 500: its server has
    # noted that the engine holds the image ("cache drift"), and the engine has not got the first request yet.
    row(messages=[_says("user", [image(1), {"type": "text", "text": "what"}])], single=True),
    row(messages=[_says("user", [{**image(2), "uuid": "mine"}])], alone="multimodal", single=True),
    row(messages=[_says("user", [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}])]),
    row(messages=[_says("user", [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}])]),
    row(messages=[_says("user", "hi", name="somebody")]),
    row(
        messages=[
            _says("user", "x"),
            _says("assistant", None, tool_calls=[CALL]),
            _says("tool", "3", tool_call_id="call_1"),
        ]
    ),
    row(
        messages=[_says("user", "hi"), _says("assistant", "I say")],
        add_generation_prompt=False,
        continue_final_message=True,
    ),
    row(add_generation_prompt=True, continue_final_message=True),
    row(add_generation_prompt=False),
    # vLLM then computes log probabilities of the prompt.
    row(echo=True, alone="prompt_logprobs", single=True),
    row(add_special_tokens=True),
    row(messages=[_says("user", "word " * 3000)]),
    row(max_tokens=ABSENT, max_completion_tokens=5),
    row(max_tokens=3, max_completion_tokens=5),
    row(max_tokens=0, alone="nothing_to_decode"),
    row(max_tokens=1),
    row(max_tokens=10**9),
    row(max_completion_tokens=0, alone="nothing_to_decode"),
    row(n=2),
    row(n=3, temperature=1, seed=4),
    row(n=0),
    row(n=None),
    row(use_beam_search=True, n=2, alone="many_sequences", single=True),
    row(logprobs=True),
    row(logprobs=True, top_logprobs=3),
    row(top_logprobs=3),
    row(logprobs=True, top_logprobs=50),
    row(logprobs=True, top_logprobs=2, return_tokens_as_token_ids=True),
    row(prompt_logprobs=1, alone="prompt_logprobs", single=True),
    row(stop="e"),
    row(stop=["e", "o"], include_stop_str_in_output=True),
    row(stop_token_ids=[10, 11, 12]),
    row(min_tokens=5),
    row(seed=7, temperature=0.8, top_p=0.9),
    row(seed=8, temperature=1.5, top_k=4),
    row(presence_penalty=1, frequency_penalty=1, repetition_penalty=1.2),
    row(logit_bias={"20": 100}),
    row(bad_words=["the"]),
    row(allowed_token_ids=[20, 21]),
    row(truncate_prompt_tokens=3),
    row(return_token_ids=True),
    row(return_prompt_text=True),
    row(user="somebody"),
    row(session_id="s"),
    row(request_id="mine"),
    row(cache_salt="salt"),
    row(response_format={"type": "json_object"}, max_tokens=12),
    row(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}, max_tokens=12),
    row(response_format={"type": "json_schema"}),
    row(response_format={"type": "nothing"}),
    row(structured_outputs={"choice": ["yes", "no"]}),
    row(structured_outputs={"regex": "[0-9]{3}"}),
    row(structured_outputs={"choice": ["a"], "regex": "b"}),
    row(tools=TOOLS),
    row(tools=TOOLS, tool_choice="none"),
    row(tools=TOOLS, tool_choice="auto"),
    row(tools=TOOLS, tool_choice="required", max_tokens=40),
    row(tools=TOOLS, tool_choice=NAMED, max_tokens=40),
    row(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "absent"}}),
    row(tool_choice="auto"),
    row(tools=[]),
    row(tools=[{"type": "function"}]),
    row(tools=[TOOL]),
    row(tools=TOOLS, tool_choice=NAMED, parallel_tool_calls=False, max_tokens=40),
    row(documents=[{"title": "t", "text": "x"}]),
    row(chat_template="{{ messages[0]['content'] }}"),
    row(chat_template_kwargs={"a": 1}),
    row(reasoning_effort="low"),
    row(reasoning_effort="some"),
    row(include_reasoning=False),
    row(thinking_token_budget=5),
    row(stream_options={"include_usage": True}),
    row(stream_options={"include_usage": True, "continuous_usage_stats": True}),
    row(stream_options={"include_usage": False}),
    row(kv_transfer_params=None),
    row(a_field_of_tomorrow=1),
    row(functions=[TOOL]),
    row(modalities=["text"], store=False, service_tier="auto", metadata={"a": "b"}),
    row(vllm_xargs={"a": 1}),
    row(priority=1),
    row(mm_processor_kwargs={}),
)

WRONG_NAMES = (
    "messages",
    "max_tokens",
    "temperature",
    "n",
    "stop",
    "tools",
    "tool_choice",
    "response_format",
    "stream",
)

CASES: tuple[Case, ...] = (*table("chat", PATH, BASE, ROWS), *wrong("chat", PATH, BASE, WRONG_NAMES, WRONG))
