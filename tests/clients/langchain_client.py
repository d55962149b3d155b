"""Asks a server through `langchain-openai`. Prints the answers as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI, OpenAI

BASE = f"{sys.argv[1]}/v1"
OPTIONS: dict[str, Any] = {
    "base_url": BASE,
    "api_key": "none",
    "model": "m",
    "temperature": 0,
    "max_tokens": 12,
    "max_retries": 0,
}

chat = ChatOpenAI(**OPTIONS)
answers: dict[str, Any] = {}
whole = chat.invoke("list the files of a directory")
answers["chat"] = [whole.content, whole.usage_metadata["total_tokens"], whole.response_metadata["finish_reason"]]
answers["chat, streamed"] = "".join(str(piece.content) for piece in chat.stream("list the files of a directory"))
answers["batch"] = [one.content for one in chat.batch(["read a file", "write a file", "close a file"])]
answers["responses"] = ChatOpenAI(**OPTIONS, use_responses_api=True).invoke("read a file").text
answers["completion"] = OpenAI(**OPTIONS).invoke("import os and")
sys.stdout.write(json.dumps(answers))
