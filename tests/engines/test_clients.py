"""Tests the proxy with clients that people use: the packages `openai` and `anthropic`, and vLLM's own benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from harness.pair import Pair
from harness.prompts import prompt
from harness.reference import Reference

MODEL_NAME = "m"

GREEDY = {"ignore_eos": True}

# The program behind `vllm bench serve`. The console script of `vllm bench serve` needs an installed distribution with
# the name `vllm`.
BENCH = """
import argparse
from vllm.benchmarks import serve
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
"""


@pytest.fixture
def client(pair: Pair) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{pair.proxy.url}/v1", api_key="none", timeout=60.0, max_retries=0)


def test_openai_completions(client: openai.OpenAI, pair: Pair, reference: Reference) -> None:
    tokens = prompt(600, seed=81)
    ask: dict[str, Any] = {"model": MODEL_NAME, "prompt": tokens, "max_tokens": 24, "temperature": 0}
    expect = reference.post("/v1/completions", {**ask, **GREEDY})["choices"][0]["text"]
    with pair.proxy.recorded(2, moved=True) as records:
        assert client.completions.create(**ask, extra_body=GREEDY).choices[0].text == expect
        pair.reset_prefix_caches()
        events = client.completions.create(**ask, extra_body=GREEDY, stream=True)
        assert "".join(event.choices[0].text for event in events) == expect
    moved = [record["moved"]["bytes"] for record in records]
    assert all(count > 0 for count in moved), moved


def test_openai_responses(client: openai.OpenAI, pair: Pair) -> None:
    question: dict[str, Any] = {"model": MODEL_NAME, "input": "read a file, " * 30, "max_output_tokens": 12}
    with pair.proxy.recorded(2, moved=True):
        whole = client.responses.create(**question, temperature=0)
        pair.reset_prefix_caches()
        with client.responses.stream(**question, temperature=0) as events:
            text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            last = events.get_final_response()
    assert text == whole.output_text == last.output_text
    assert text
    # The decode instance holds both responses.
    assert client.responses.retrieve(whole.id).output_text == text
    assert client.responses.retrieve(last.id).id == last.id
    more = client.responses.create(model=MODEL_NAME, input="and?", previous_response_id=last.id, max_output_tokens=4)
    assert more.previous_response_id == last.id


def test_anthropic_messages(pair: Pair) -> None:
    client = anthropic.Anthropic(base_url=pair.proxy.url, api_key="none", timeout=60.0, max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "write a file, " * 30}]
    question: dict[str, Any] = {"model": MODEL_NAME, "messages": messages, "max_tokens": 12}
    question["extra_body"] = {"temperature": 0}
    with pair.proxy.recorded(2, moved=True):
        whole = client.messages.create(**question)
        pair.reset_prefix_caches()
        with client.messages.stream(**question) as events:
            text = "".join(events.text_stream)
            last = events.get_final_message()
    assert [block.text for block in whole.content if block.type == "text"] == [text]
    assert text
    assert last.usage.input_tokens == whole.usage.input_tokens
    counted = client.messages.count_tokens(model=MODEL_NAME, messages=messages)
    assert counted.input_tokens == whole.usage.input_tokens


def test_openai_chat(client: openai.OpenAI, pair: Pair) -> None:
    assert [model.id for model in client.models.list()][:1] == [MODEL_NAME]
    messages = [{"role": "user", "content": "import os and list a directory, " * 20}]
    ask: dict[str, Any] = {
        "model": MODEL_NAME,
        "messages": messages,
        "max_tokens": 24,
        "temperature": 0,
        "extra_body": GREEDY,
    }
    with pair.proxy.recorded(2) as records:
        whole = client.chat.completions.create(**ask)
        pair.reset_prefix_caches()
        events = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        text, usage = "", None
        for event in events:
            text += "".join(choice.delta.content or "" for choice in event.choices)
            usage = event.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None and usage.completion_tokens == 24
    assert all(record["outcome"] == "done" for record in records)


def test_openai_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL_NAME, prompt=prompt(4000, seed=82), max_tokens=1)
    assert "maximum" in str(refused.value)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="a", max_tokens=8)


def test_vllm_bench_serve(pair: Pair, tmp_path: Path) -> None:
    command = [
        sys.executable, "-c", BENCH, "--backend", "openai", "--base-url", pair.proxy.url, "--model", MODEL_NAME,
        "--tokenizer", str(pair.options.model), "--dataset-name", "random", "--random-input-len", "400",
        "--random-output-len", "16", "--num-prompts", "24", "--max-concurrency", "4", "--ignore-eos",
        "--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json", "--disable-tqdm",
    ]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 24, result
    assert result["total_output_tokens"] == 24 * 16
