"""Cases of paths and methods."""

from __future__ import annotations

import json

from harness.differential.case import JSON, Case, bare

BODY = json.dumps({"model": "m", "prompt": "list files", "max_tokens": 4, "temperature": 0}).encode()
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/models",
    "/tokenize",
    "/health",
)

UNKNOWN = (
    "/",
    "/v1",
    "/v1/",
    "/v1/unknown",
    "/v2/completions",
    "/completions",
    "/chat/completions",
    "/v1/completions/more",
    "//v1/completions",
    "/v1//completions",
    "/v1/./completions",
    "/v1/%63ompletions",
    "/v1%2Fcompletions",
    "/V1/completions",
    "/v1/completions?a=b",
    "/v1/completions;a=b",
    "/v1/engines",
    "/favicon.ico",
)

CASES: tuple[Case, ...] = (
    *(bare(method, path) for path in PATHS for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")),
    *(Case(f"POST {path}", path, BODY, headers=JSON, alone="any") for path in UNKNOWN),
    *(Case(f"POST {path}/", f"{path}/", BODY, headers=JSON, alone="any") for path in PATHS),
    *(bare("GET", f"{path}/?a=b") for path in PATHS),
    bare(
        "OPTIONS",
        "/v1/chat/completions",
        name="preflight",
        origin="http://example.com",
        access_control_request_method="POST",
    ),
    bare("BREW", "/v1/completions"),
    bare("GET", "/v1/models?a=b"),
    Case("POST /v1/models", "/v1/models", b"{}", headers=JSON, alone="any"),
    Case("a chat with a query", "/v1/chat/completions?x=1", json.dumps(CHAT).encode()),
)
