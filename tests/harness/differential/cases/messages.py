"""Cases of `/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from typing import Any

from harness.differential.case import ABSENT, Case, row, table, wrong
from harness.differential.cases.values import SCHEMA, UNICODE, WRONG

PATH = "/v1/messages"
BASE: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "list files"}],
    "max_tokens": 6,
    "temperature": 0,
}
TOOL = {"name": "read", "description": "Reads a file.", "input_schema": SCHEMA}
USE = {"type": "tool_use", "id": "t", "name": "read", "input": {"a": True}}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": "3"}


def _said(*contents: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]


ROWS = (
    row(),
    row(model=ABSENT),
    row(model="lora", alone="any", single=True),
    row(model="nobody"),
    row(messages=ABSENT),
    row(messages=[]),
    row(messages=_said("hi", "yes", "and?")),
    row(messages=_said("hi", "I say")),
    row(messages=_said([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])),
    row(messages=_said([{"type": "nothing"}])),
    row(messages=_said("x", [USE], [RESULT])),
    row(messages=[{"role": "system", "content": "no"}]),
    row(messages=[{"role": "pirate", "content": "arr"}]),
    row(messages=_said(UNICODE)),
    row(messages=_said("")),
    row(messages=_said("word " * 3000)),
    row(system="Be brief."),
    row(system=[{"type": "text", "text": "Be brief."}]),
    row(system=5),
    row(max_tokens=ABSENT),
    row(max_tokens=0, alone="nothing_to_decode"),
    row(max_tokens=1),
    row(max_tokens=10**9),
    row(stop_sequences=["e"]),
    row(stop_sequences="e"),
    row(top_p=0.5, top_k=3),
    row(metadata={"user_id": "u"}),
    row(tools=[TOOL]),
    row(tools=[TOOL], tool_choice={"type": "none"}),
    row(tools=[TOOL], tool_choice={"type": "any"}, max_tokens=40),
    row(tools=[TOOL], tool_choice={"type": "tool", "name": "read"}, max_tokens=40),
    row(tools=[{"name": "read"}]),
    row(thinking={"type": "enabled", "budget_tokens": 5}),
    row(kv_transfer_params=None),
    row(a_field_of_tomorrow=1),
)

COUNTED = (
    row(),
    row(system="Be brief."),
    row(tools=[TOOL]),
    row(messages=[]),
    row(messages=ABSENT),
    row(model="nobody"),
    row(messages=_said(UNICODE)),
)

WRONG_NAMES = ("messages", "max_tokens", "temperature", "stop_sequences", "tools", "stream")

CASES: tuple[Case, ...] = (
    *table("messages", PATH, BASE, ROWS),
    *wrong("messages", PATH, BASE, WRONG_NAMES, WRONG),
    *table("count_tokens", f"{PATH}/count_tokens", BASE, COUNTED, streams=(False,)),
)
