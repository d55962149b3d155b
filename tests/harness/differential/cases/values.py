"""Values that several tables use."""

from __future__ import annotations

from typing import Any

# Values that have the wrong type or the wrong size for most fields.
WRONG: tuple[Any, ...] = ("x", -5, [], {}, 1e30)

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}

UNICODE = "Zürich 東京 🦀 \u202e\u0000\ufeff é\u0301"

TOOL = {"name": "read", "description": "Reads a file.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": TOOL}]
