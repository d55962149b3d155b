"""Starts a sidecar with only the options that a user types. A client takes the place of the engine."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.client import call
from harness.drop_in.chunks import LAYOUT
from harness.drop_in.forked import START_BOUND_S
from harness.drop_in.nodes import CONNECT_BOUND_S, Notices, OurReceiver, OurSender
from harness.logs import LOGS
from harness.process import Process
from harness.sidecar import BINARIES
from pd_sidecar.client import Client
from pd_sidecar.sidecar.wire import VERSION, Hello, Target


class _Bare:
    """A sidecar with `words` as its command line. The sidecar's sockets are inside `folder`. `within` is a command that
    runs the binary, for example in other namespaces.
    """

    role: str

    def __init__(
        self,
        name: str,
        words: list[str | Path],
        admin: str,
        folder: Path,
        env: Mapping[str, str] | None = None,
        within: Sequence[str] = (),
    ) -> None:
        self.notices: Notices
        self.name = name
        environ = {"XDG_RUNTIME_DIR": str(folder), "VIRTUAL_ENV": sys.prefix, **(env or {})}
        self.process = Process(name, [*within, BINARIES / "sidecar", *words], LOGS / f"{name}.log", environ)
        deadline = time.monotonic() + START_BOUND_S
        while not _answers(f"http://{admin}/health"):
            if not self.process.alive or time.monotonic() > deadline:
                raise self.process.failure("does not serve")
            time.sleep(0.05)
        leg = "prefill" if self.role == "sender" else "decode"
        path = folder / "pd-sidecar" / f"{self.role}.sock"
        self.clients = [Client.connect(str(path), Hello(VERSION, "test", leg, 0, 1, LAYOUT), CONNECT_BOUND_S)]

    def environ(self) -> dict[str, str]:
        """Returns the environment of the running sidecar."""
        text = Path(f"/proc/{self.process.pid}/environ").read_text()
        return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)

    def stop(self) -> None:
        self.clients[0].close()
        self.process.stop()


class BareSender(_Bare, OurSender):
    role = "sender"


class BareReceiver(_Bare, OurReceiver):
    role = "receiver"
    target: Target = None  # type: ignore[assignment]


def _answers(url: str) -> bool:
    try:
        return call(url, timeout_s=2.0)[0] == 200
    except OSError:
        return False
