"""Reads traces of other tools: conversations in the form of ShareGPT or of OpenAI's API, and Mooncake's traces."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pd_sidecar.bench.workload import BLOCK_TOKENS, BadInputError, Block, Conversation, Turn, estimated_tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

USERS = {"human", "user"}
ANSWERS = {"gpt", "chatgpt", "bing", "bard", "assistant", "model"}
SYSTEM = {"system"}
MOST_BYTES = 8 << 30
"""A larger file is not read: all of it would have to fit into memory."""


def read(path: Path, kind: str = "auto") -> list[Conversation]:
    """Returns the conversations of a file, in its order. Raises `BadInputError`.

    `kind` is a key of `FORMATS`, or `auto`: then the first entry decides.
    """
    entries = _entries(path)
    if kind == "auto":
        first = entries[0][1]
        kind = "mooncake" if isinstance(first, dict) and "input_length" in first else "sharegpt"
    conversations = [found for where, entry in entries if (found := FORMATS[kind](where, entry)) is not None]
    if not conversations:
        raise BadInputError(f"{path}: no entry has a message of a user")
    return conversations


def _entries(path: Path) -> list[tuple[str, Any]]:
    """Returns each entry of a JSON array, or of a file with one JSON object for each line, and the entry's place."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise BadInputError(f"{path}: larger than {MOST_BYTES >> 30} GiB; cut the file, for example with `head`")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: {error}") from error
    if text.lstrip().startswith("["):
        try:
            entries = [(f"{path}: entry {number}", entry) for number, entry in enumerate(json.loads(text))]
        except ValueError as error:
            raise BadInputError(f"{path}: no JSON array: {error}") from error
    else:
        entries = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    entries.append((f"{path}: line {number}", json.loads(line)))
                except ValueError as error:
                    raise BadInputError(f"{path}: line {number}: no JSON: {error}") from error
    if not entries:
        raise BadInputError(f"{path}: the file has no entry")
    return entries


def sharegpt(where: str, entry: Any) -> Conversation | None:
    """Returns a conversation of `conversations` (`from`, `value`) or `messages` (`role`, `content`).

    The recorded answers only say how long the answers are: the server's own answers take their place. Returns `None` if
    no message of a user is followed by an answer.
    """
    messages = _field(where, entry, ("conversations", "messages", "items"), list)
    turns: list[Turn] = []
    system, asked = "", ""
    for number, message in enumerate(messages):
        at = f"{where}: message {number}"
        author = _field(at, message, ("from", "role"), str)
        text = _field(at, message, ("value", "content"), str)
        if author in SYSTEM and not turns:
            system += text
        elif author in USERS:
            asked += text
        elif author in ANSWERS and asked:
            turns.append(Turn(max(1, estimated_tokens(text)), text=asked))
            asked = ""
    return Conversation(tuple(turns), system=system) if turns else None


def mooncake(where: str, entry: Any) -> Conversation:
    """Returns a request of Mooncake's trace: `timestamp` (ms), `input_length`, `output_length`, `hash_ids`.

    Each hash stands for a block of 512 tokens: prompts share the tokens of their equal hashes.
    """
    timestamp, tokens, answer = (_number(where, entry, name) for name in ("timestamp", "input_length", "output_length"))
    hashes = _field(where, entry, ("hash_ids",), list)
    if not 0 < tokens <= len(hashes) * BLOCK_TOKENS:
        raise BadInputError(
            f"{where}: `input_length` is {tokens:g}, but must be between 1 and {BLOCK_TOKENS} for each of the "
            f"{len(hashes)} `hash_ids`"
        )
    blocks, left = [], int(tokens)
    for name in hashes:
        if left:
            blocks.append(Block(f"hash-{name}", min(left, BLOCK_TOKENS)))
            left -= blocks[-1].tokens
    return Conversation((Turn(max(1, int(answer)), tuple(blocks)),), at_s=timestamp / 1000)


FORMATS: dict[str, Callable[[str, Any], Conversation | None]] = {"sharegpt": sharegpt, "mooncake": mooncake}


def _field(where: str, entry: Any, names: tuple[str, ...], kind: type) -> Any:
    """Returns the first of these fields that the entry has. Raises `BadInputError` if there is none of this type."""
    if not isinstance(entry, dict):
        raise BadInputError(f"{where}: must be an object, is {type(entry).__name__}")
    for name in names:
        if name in entry:
            if isinstance(entry[name], kind):
                return entry[name]
            raise BadInputError(f"{where}: `{name}` must be a {kind.__name__}, is {type(entry[name]).__name__}")
    raise BadInputError(f"{where}: needs a field {' or '.join(f'`{name}`' for name in names)}")


def _number(where: str, entry: Any, name: str) -> float:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e12:
        raise BadInputError(f"{where}: `{name}` must be a number from 0, is {value!r}")
    return value
