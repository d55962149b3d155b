"""Cases of `/v1/responses`."""

from __future__ import annotations

from typing import Any

from harness.differential.case import ABSENT, Case, bare, row, table, wrong
from harness.differential.cases.values import SCHEMA, TOOL, UNICODE, WRONG

PATH = "/v1/responses"
BASE: dict[str, Any] = {"model": "m", "input": "list files", "max_output_tokens": 6, "temperature": 0}
FUNCTION = {"type": "function", **TOOL}
FORMAT = {"type": "json_schema", "name": "s", "schema": SCHEMA}
CALL = {"type": "function_call", "call_id": "c", "name": "read", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "3"}

ROWS = (
    row(),
    row(model=ABSENT),
    row(model="lora", alone="any", single=True),
    row(model="nobody"),
    row(input=""),
    row(input=ABSENT),
    row(input=UNICODE),
    row(input=[]),
    row(input=[{"role": "user", "content": "hi"}]),
    row(input=[{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]),
    row(input=[{"type": "message", "role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}]),
    row(input=[{"role": "user", "content": "x"}, CALL, RESULT]),
    row(input=[{"type": "nothing"}]),
    row(input="word " * 3000),
    row(instructions="Be brief."),
    row(max_output_tokens=1),
    row(max_output_tokens=0),
    row(max_output_tokens=10**9),
    row(store=False),
    row(store=True, metadata={"a": "b"}),
    row(background=True, store=False, alone="stored_response"),
    row(previous_response_id="resp_unknown", alone="stored_response"),
    row(previous_response_id="wrong"),
    row(request_id="resp_mine"),
    row(seed=3, temperature=1.0),
    row(temperature=0, top_p=0.5, top_k=3),
    row(top_logprobs=2, include=["message.output_text.logprobs"]),
    row(include=["reasoning.encrypted_content"]),
    row(text={"format": FORMAT}, max_output_tokens=12),
    row(text={"format": {"type": "text"}}),
    row(text={"format": {"type": "nothing"}}),
    row(tools=[FUNCTION]),
    row(tools=[FUNCTION], tool_choice="none"),
    row(tools=[FUNCTION], tool_choice="required", max_output_tokens=40),
    row(tools=[FUNCTION], tool_choice={"type": "function", "name": "read"}, max_output_tokens=40),
    row(tools=[{"type": "nothing"}]),
    row(tools=[{"type": "web_search_preview"}], alone="many_sequences"),
    row(parallel_tool_calls=False),
    row(reasoning={"effort": "low"}),
    row(truncation="auto"),
    row(truncation="disabled"),
    row(service_tier="flex"),
    row(user="u", prompt_cache_key="k"),
    row(prompt={"id": "p"}),
    row(kv_transfer_params=None),
    row(a_field_of_tomorrow=1),
    row(presence_penalty=1, frequency_penalty=1),
    row(ignore_eos=True),
)

WRONG_NAMES = ("input", "max_output_tokens", "temperature", "tools", "text", "store", "stream", "previous_response_id")

CASES: tuple[Case, ...] = (
    *table("responses", PATH, BASE, ROWS),
    *wrong("responses", PATH, BASE, WRONG_NAMES, WRONG),
    bare("GET", f"{PATH}/resp_unknown"),
    bare("GET", f"{PATH}/unknown"),
    bare("GET", f"{PATH}/resp_unknown?stream=true&starting_after=3"),
    bare("GET", f"{PATH}/resp_unknown?stream=maybe"),
    bare("DELETE", f"{PATH}/resp_unknown"),
    bare("POST", f"{PATH}/resp_unknown/cancel"),
    bare("GET", f"{PATH}/resp_unknown/cancel"),
    bare("GET", f"{PATH}/resp_unknown/input_items"),
)
