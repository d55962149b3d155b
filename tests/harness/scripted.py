"""A small HTTP server in place of an engine, for tests that only need its answers."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JsonHandler(BaseHTTPRequestHandler):
    """Reads and writes JSON bodies. A test's own handler derives from this class."""

    protocol_version = "HTTP/1.1"

    def body(self) -> Any:
        """Returns the body of the request; an empty object if there is none."""
        return json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")

    def answer(self, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def stream(self, events: Iterable[dict[str, Any]]) -> None:
        """Sends server-sent events, and `[DONE]` at the end."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        # Without a length, the end of the connection is the end of the answer.
        self.send_header("connection", "close")
        self.end_headers()
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Does nothing: the proxy has its own log."""


@contextlib.contextmanager
def serving(handler: type[JsonHandler], host: str = "127.0.0.1") -> Iterator[str]:
    """Serves on a free port of `host` inside the block. Yields `host:port`."""
    server = ThreadingHTTPServer((host, 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
