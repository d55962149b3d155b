"""Asks a server through `openai`. Prints the answers as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
CHAT: list[Any] = [{"role": "user", "content": "list the files of a directory"}]
GREEDY: dict[str, Any] = {"model": "m", "temperature": 0}

answers: dict[str, Any] = {"models": [model.id for model in client.models.list()]}
whole = client.chat.completions.create(messages=CHAT, max_tokens=12, logprobs=True, **GREEDY)
answers["chat"] = [whole.choices[0].message.content, len(whole.choices[0].logprobs.content), whole.usage.total_tokens]
with client.chat.completions.stream(messages=CHAT, max_tokens=12, **GREEDY) as events:
    answers["chat, streamed"] = "".join(event.delta for event in events if event.type == "content.delta")
told = client.completions.create(prompt=["import os and", "import sys and"], max_tokens=8, **GREEDY)
answers["completions"] = [choice.text for choice in told.choices]
first = client.responses.create(input="read a file", max_output_tokens=12, **GREEDY)
more = client.responses.create(input="and?", previous_response_id=first.id, max_output_tokens=8, **GREEDY)
answers["responses"] = [first.output_text, more.output_text, client.responses.retrieve(first.id).output_text]
with client.responses.stream(input="read a file", max_output_tokens=12, **GREEDY) as events:
    answers["responses, streamed"] = "".join(e.delta for e in events if e.type == "response.output_text.delta")
try:
    client.chat.completions.create(messages=CHAT, model="nobody")
except openai.NotFoundError as error:
    answers["error"] = [error.status_code, error.body]
sys.stdout.write(json.dumps(answers))
