"""Reads streams of server-sent events.

An engine puts several tokens into one event if they come at the same time, so two streams of one answer may have
different numbers of events. The folded form of a stream is the same for all divisions of the text into events.
"""

from __future__ import annotations

import json
from typing import Any

# Lists of these names have one entry per token; all other lists are whole values.
PER_TOKEN = {"token_ids", "tokens", "token_logprobs", "top_logprobs", "text_offset", "content", "logprobs"}
# Texts of these names come in pieces; all other texts are whole values.
IN_PIECES = {"text", "content", "reasoning", "reasoning_content", "arguments", "delta", "partial_json", "thinking"}


def events_of(body: bytes) -> list[tuple[str, Any]]:
    """Returns the events of a stream, each as its name and its data. Data that is not JSON stays text."""
    events = []
    for block in body.decode(errors="replace").replace("\r\n", "\n").split("\n\n"):
        fields = [line.partition(":")[::2] for line in block.split("\n") if line and not line.startswith(":")]
        name = "".join(value.strip() for key, value in fields if key == "event")
        data = "\n".join(value.removeprefix(" ") for key, value in fields if key == "data")
        if fields:
            events.append((name, json.loads(data) if data.startswith("{") else data))
    return events


def folded(events: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the folded form: one merged event for each choice; without choices, the merged pieces of each text."""
    streams: dict[str, Any] = {}
    for name, data in events:
        if not isinstance(data, dict):
            streams.setdefault("end", []).append([name, data])
            continue
        event = {key: value for key, value in data.items() if key != "sequence_number"}
        choices = event.get("choices")
        if not isinstance(choices, list):
            _add(streams.setdefault("events", []), name, event)
        elif not choices:
            # Only the last event has no choice: the usage.
            streams.setdefault("last", []).append([name, event])
        else:
            for choice in choices:
                key = f"choice {choice.get('index')}"
                streams[key] = _merge(streams.get(key), {**event, "choices": [choice]})
    return streams


def _add(merged: list[Any], name: str, data: dict[str, Any]) -> None:
    """Adds an event, merged with the event before if both are pieces of one text."""
    kind = [name, *(data.get(key) for key in ("type", "output_index", "content_index", "index"))]
    if merged and merged[-1]["kind"] == kind:
        merged[-1]["data"] = _merge(merged[-1]["data"], data)
    else:
        merged.append({"kind": kind, "data": data})


def _merge(before: Any, after: Any, name: str = "") -> Any:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return {key: _merge(before.get(key), after.get(key), key) for key in keys}
    if isinstance(before, list) and isinstance(after, list):
        if name in PER_TOKEN:
            return before + after
        if len(before) == len(after):
            return [_merge(one, other, name) for one, other in zip(before, after, strict=True)]
    if isinstance(before, str) and isinstance(after, str) and name in IN_PIECES:
        return before + after
    return before if after is None else after
