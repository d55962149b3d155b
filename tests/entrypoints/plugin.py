"""A pytest plugin for vLLM's own tests: each server that a test starts is the server at `PD_SERVER`.

The tests name models of a hub. The server has one small model under all of these names, and the plugin gives this
model's tokenizer for each name. So a test that expects a text of its own model fails, through the proxy and plain.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any, Self
from urllib.parse import urlsplit

import anthropic
import openai

SERVER = os.environ["PD_SERVER"]
MODEL = os.environ["PD_MODEL"]


class RemoteOpenAIServer:
    """Stands for a server that vLLM's tests would start. Has the methods that the tests use."""

    DUMMY_API_KEY = "token-abc123"

    def __init__(self, model: str, *_: Any, **__: Any) -> None:
        self.model = model
        self.host, self.port = urlsplit(SERVER).hostname, urlsplit(SERVER).port
        self.url_root = SERVER

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def url_for(self, *parts: str) -> str:
        return f"{SERVER}/{'/'.join(part.strip('/') for part in parts if part)}"

    def get_client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url_for("v1"), **self._options(more))

    def get_async_client(self, **more: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url_for("v1"), **self._options(more))

    def get_client_anthropic(self, **more: Any) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=SERVER, **self._options(more))

    def get_async_client_anthropic(self, **more: Any) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=SERVER, **self._options(more))

    def _options(self, more: dict[str, Any]) -> dict[str, Any]:
        return {"api_key": self.DUMMY_API_KEY, "max_retries": 0, "timeout": 60, **more}


def _install() -> None:
    utils = types.ModuleType("tests.utils")
    vars(utils).update(RemoteOpenAIServer=RemoteOpenAIServer, ROCM_ENV_OVERRIDES={}, ROCM_EXTRA_ARGS=[], VLLM_PATH="")
    sys.modules["tests.utils"] = utils
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained
    AutoTokenizer.from_pretrained = lambda *_, **__: read(MODEL)
    import vllm.tokenizers

    vllm.tokenizers.get_tokenizer = lambda *_, **__: read(MODEL)
    from vllm.transformers_utils import repo_utils

    # A fixture downloads the adapter `zephyr-lora`, which the server already has.
    repo_utils.hf_api = lambda: types.SimpleNamespace(snapshot_download=lambda **_: "")


_install()
