"""Cases of the endpoints that the proxy passes on, and of those that it does not have."""

from __future__ import annotations

from typing import Any

from harness.differential.case import ABSENT, Case, bare, post, row, table
from harness.differential.cases.values import TOOLS, UNICODE

CHAT = [{"role": "user", "content": "list files"}]
GREEDY: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 4}

TOKENIZE = (
    row(),
    row(prompt=""),
    row(prompt=UNICODE),
    row(prompt=ABSENT),
    row(prompt=5),
    row(model=ABSENT),
    row(model="nobody"),
    row(add_special_tokens=False),
    row(return_token_strs=True),
    row(prompt=ABSENT, messages=CHAT),
    row(prompt=ABSENT, messages=CHAT, add_generation_prompt=False, return_token_strs=True),
    row(prompt=ABSENT, messages=CHAT, tools=TOOLS),
    row(prompt=ABSENT, messages=[]),
    row(kv_transfer_params=None),
)

DETOKENIZE = (row(), row(tokens=[]), row(tokens=[999_999]), row(tokens="x"), row(tokens=ABSENT), row(model="nobody"))

# Without `stream`: vLLM 0.32 then answers with only the last piece of each text, and the division into pieces depends
# on the time.
BATCH = (
    row(),
    row(messages=[CHAT]),
    row(messages=CHAT),
    row(messages=[]),
    row(n=2),
    row(logprobs=True, top_logprobs=1),
    row(model="nobody"),
    row(tools=TOOLS),
)

# Bodies for models that do not generate text: the engine answers 404.
OTHER_MODELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/embeddings", {"input": "hello"}),
    ("/v2/embed", {"texts": ["hello"]}),
    ("/pooling", {"input": "hello"}),
    ("/classify", {"input": "hello"}),
    ("/score", {"text_1": "a", "text_2": "b"}),
    ("/v1/score", {"text_1": "a", "text_2": "b"}),
    ("/rerank", {"query": "a", "documents": ["b"]}),
    ("/v1/rerank", {"query": "a", "documents": ["b"]}),
    ("/v2/rerank", {"query": "a", "documents": ["b"]}),
    ("/generative_scoring", {"query": "a", "items": ["b"]}),
    ("/v1/audio/transcriptions", {}),
    ("/v1/audio/translations", {}),
)

FORM = b'--B\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--B--\r\n'

INVOCATIONS = (
    row(messages=CHAT),
    row(prompt="list files"),
    row(prompt="list files", messages=CHAT),
    row(input="hello", max_tokens=ABSENT),
    row(tokens=[5, 6, 7]),
)

CASES: tuple[Case, ...] = (
    *table("tokenize", "/tokenize", {"model": "m", "prompt": "hello world"}, TOKENIZE, streams=(False,)),
    *table("detokenize", "/detokenize", {"model": "m", "tokens": [5, 6, 7]}, DETOKENIZE, streams=(False,)),
    *table("batch", "/v1/chat/completions/batch", {**GREEDY, "messages": [CHAT, CHAT]}, BATCH, streams=(False,)),
    *table("invocations", "/invocations", GREEDY, INVOCATIONS),
    *(post(f"POST {path}", path, {"model": "m", **body}) for path, body in OTHER_MODELS),
    bare("POST", "/v1/audio/transcriptions", FORM, name="a form", content_type="multipart/form-data; boundary=B"),
    bare("GET", "/v1/models/m"),
    bare("GET", "/version"),
    bare("GET", "/ping"),
    bare("POST", "/ping"),
    bare("GET", "/load"),
    bare("GET", "/tokenizer_info"),
    bare("GET", "/v1/realtime"),
    bare("GET", "/v1/realtime/"),
    bare(
        "GET",
        "/v1/realtime?model=m",
        name="a WebSocket of a model without audio",
        connection="Upgrade",
        upgrade="websocket",
        sec_websocket_version="13",
        sec_websocket_key="AAAAAAAAAAAAAAAAAAAAAA==",
    ),
    bare("GET", "/metrics"),
    bare("GET", "/docs"),
    bare("GET", "/openapi.json"),
    bare("GET", "/server_info"),
    bare("GET", "/is_sleeping"),
    post("render a chat", "/v1/chat/completions/render", {"model": "m", "messages": CHAT}),
    post("render a completion", "/v1/completions/render", {"model": "m", "prompt": "a"}),
    post("load an adapter without a name", "/v1/load_lora_adapter", {}),
)
