"""Starts a Redis, and talks to it."""

from __future__ import annotations

import contextlib
import os
import socket
from io import BufferedRWPair
from pathlib import Path
from typing import Any

from harness.process import Process
from harness.sidecar import ROOT
from harness.waiting import until

PROGRAM = Path(os.environ.get("REDIS", ROOT / "target" / "redis" / "redis-server"))


def redis_server(port: int, folder: Path, log: Path, *options: str) -> Process:
    """Starts a Redis that keeps nothing when it ends, and returns when it answers."""
    flags: list[str | Path] = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder, *options]
    process = Process("redis", [PROGRAM, *flags], log)

    def answers() -> bool:
        with contextlib.suppress(OSError):
            ask(port, b"PING")
            return True
        return False

    until("it does not answer", answers, process=process)
    return process


def ask(port: int, *words: bytes) -> Any:
    """Sends a command to a Redis, and returns the answer; the text of an error, if the answer is one."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as link, link.makefile("rwb") as file:
        file.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words))
        file.flush()
        return _answer(file)


def _answer(file: BufferedRWPair[Any, Any]) -> Any:
    line = file.readline().rstrip(b"\r\n")
    kind, rest = line[:1], line[1:]
    if kind == b"$":
        return file.read(int(rest) + 2)[:-2] if int(rest) >= 0 else None
    if kind == b"*":
        return [_answer(file) for _ in range(int(rest))]
    if kind == b":":
        return int(rest)
    if not kind:
        raise ConnectionError("Redis has closed the connection")
    return rest
