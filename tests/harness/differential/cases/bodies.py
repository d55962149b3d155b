"""Cases whose bodies are unusual as bytes, or that have unusual headers."""

from __future__ import annotations

import json

from harness.differential.case import JSON, Case

PATH = "/v1/completions"
FIELDS = {"model": "m", "prompt": "caf\u00e9 reads", "max_tokens": 4, "temperature": 0}
TEXT = json.dumps(FIELDS, ensure_ascii=False)
GOOD = TEXT.encode()
CHAT = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0})


def _bytes(name: str, body: bytes, *, path: str = PATH, alone: str | None = None, **headers: str) -> Case:
    more = {key.replace("_", "-"): value for key, value in headers.items()}
    return Case(f"body: {name}", path, body, headers={**JSON, **more}, alone=alone)


def _kind(kind: str | None, *, path: str = PATH, body: bytes = GOOD) -> Case:
    headers = {} if kind is None else {"content-type": kind}
    return Case(f"content type {kind}: {path}", path, body, headers=headers, alone=None)


# Bodies that are no JSON, or that have another type than an object.
NOT_OBJECTS = {
    "empty": b"",
    "blank": b"  \n",
    "null": b"null",
    "a list": b"[]",
    "a number": b"5",
    "a string": b'"a"',
    "cut": GOOD[:-5],
    "trailing comma": b'{"model": "m",}',
    "single quotes": b"{'model': 'm'}",
    "two objects": GOOD + GOOD,
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "not quoted": b"{model: m}",
    "a control character": b'{"prompt": "a\x01"}',
    "a comment": b'{"model": "m" /* a */}',
    "nested": b'{"prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}",
}

CASES: tuple[Case, ...] = (
    *(_bytes(name, body, alone="any") for name, body in NOT_OBJECTS.items()),
    *(
        _bytes(f"{name} at {path}", body, path=path, alone="any")
        for name, body in [("empty", b""), ("a list", b"[]"), ("cut", b'{"a": ')]
        for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize", "/invocations")
    ),
    _bytes("an empty object", b"{}", alone="any"),
    _bytes("UTF-8 with a mark", b"\xef\xbb\xbf" + GOOD),
    _bytes("UTF-16", TEXT.encode("utf-16")),
    _bytes("UTF-16 without a mark", TEXT.encode("utf-16-le")),
    _bytes("UTF-32", TEXT.encode("utf-32")),
    _bytes("escapes", json.dumps(FIELDS).encode()),
    _bytes("blanks", b"  " + GOOD.replace(b", ", b" ,\n\t ") + b"\n"),
    _bytes("NaN", GOOD[:-1] + b', "top_p": NaN}', alone="any"),
    _bytes("Infinity", GOOD[:-1] + b', "x": Infinity}'),
    _bytes("a repeated field", GOOD[:-1] + b', "max_tokens": 2}'),
    _bytes("a surrogate", b'{"model": "m", "prompt": "\\ud83d\\ude00", "max_tokens": 4, "temperature": 0}'),
    _bytes("half a surrogate", b'{"model": "m", "prompt": "\\ud83d", "max_tokens": 4, "temperature": 0}', alone="any"),
    _bytes("a large number", GOOD[:-1] + b', "seed": 123456789012345678901234567890}', alone="any"),
    _bytes("a long number", GOOD[:-1] + b', "x": ' + b"1" * 5000 + b"}", alone="any"),
    _bytes("oversized", GOOD[:-1] + b" " * (17 << 20) + b"}", alone="any"),
    _bytes("large", GOOD[:-1] + b" " * (1 << 20) + b"}"),
    _bytes("own transfer parameters", GOOD[:-1] + b', "kv_transfer_params": {"a": 1}}', alone="any"),
    _bytes("an id in a header", GOOD, x_request_id="mine"),
    _bytes("an odd id in a header", GOOD, x_request_id="a b/c"),
    _bytes("a key", GOOD, authorization="Bearer x"),
    _bytes("accepts nothing", GOOD, accept="image/png"),
    _bytes("expects an answer", GOOD, expect="100-continue"),
    _bytes("chunked", b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD), transfer_encoding="chunked"),
    _bytes("another origin", GOOD, origin="http://example.com"),
    _bytes("accepts gzip", GOOD, accept_encoding="gzip"),
    *(
        _kind(kind)
        for kind in (
            None,
            "",
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=B",
            "application/json; charset=utf-8",
            "application/json; charset=latin-1",
            "APPLICATION/JSON",
            "application/jsonl",
            "application/vnd.api+json",
            "application/json, text/plain",
        )
    ),
    *(_kind("text/plain", path=path, body=CHAT.encode()) for path in ("/v1/chat/completions", "/v1/messages")),
    *(_kind("text/plain", path=path, body=CHAT.encode()) for path in ("/tokenize", "/v1/responses", "/invocations")),
)
