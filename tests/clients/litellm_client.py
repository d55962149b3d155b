"""Asks a server through `litellm`. Prints the answers as JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# Otherwise the import waits for a list of prices from the network.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

BASE = f"{sys.argv[1]}/v1"
CHAT: list[Any] = [{"role": "user", "content": "list the files of a directory"}]
GREEDY: dict[str, Any] = {"api_base": BASE, "api_key": "none", "temperature": 0, "max_tokens": 12}

answers: dict[str, Any] = {}
whole = litellm.completion(model="openai/m", messages=CHAT, **GREEDY)
answers["chat"] = [whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.total_tokens]
events = litellm.completion(model="openai/m", messages=CHAT, stream=True, **GREEDY)
answers["chat, streamed"] = "".join(event.choices[0].delta.content or "" for event in events)
told = litellm.text_completion(model="text-completion-openai/m", prompt="import os and", **GREEDY)
answers["completion"] = told.choices[0].text
try:
    litellm.completion(model="openai/nobody", messages=CHAT, **GREEDY)
except litellm.NotFoundError as error:
    answers["error"] = [type(error).__name__, error.status_code]
sys.stdout.write(json.dumps(answers))
