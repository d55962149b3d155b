"""Starts LMCache processes. Each test interpreter starts one nursery (`peer.py`), which forks these processes."""

from __future__ import annotations

import json
import os
import select
import socket
import tempfile
import time
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

from harness.logs import LOGS
from harness.process import Child, Process
from harness.sidecar import ROOT

LMCACHE_PYTHON = Path(os.environ.get("PD_TEST_LMCACHE_VENV", ROOT / ".venv-lmcache")) / "bin" / "python"
# Without this variable UCX opens all network interfaces that exist at this moment. A test for two hosts makes and
# removes interfaces at the same time, and connections through such an interface then fail.
LMCACHE_ENV = {"UCX_NET_DEVICES": "lo"}

START_BOUND_S = 120.0

# The imports need six seconds of CPU time. On a busy machine they took two minutes.
NURSERY_BOUND_S = 300.0


class ForkedPeer(Process):
    """One LMCache process. The constructor starts the process, which appends its output to `log`."""

    def __init__(self, name: str, options: dict[str, Any], log: Path) -> None:
        self._options = options
        super().__init__(name, ["lmcache", json.dumps(options)], log)

    def _launch(self) -> Child:
        """Returns a fork of this interpreter's nursery."""
        return _Fork(_nursery().fork(self._options, self.log))


class _Fork:
    """A process that is not a child of this interpreter. The exit code of such a process is unknown, so this class
    always reports -1.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._pidfd: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._pidfd = None

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self._pidfd is not None:
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            if not poller.poll(None if timeout is None else timeout * 1000):
                raise TimeoutExpired("lmcache", timeout or 0)
            os.close(self._pidfd)
            self._pidfd = None
        return -1


class _Nursery:
    def __init__(self) -> None:
        # The folder is not inside the repository, because the path of a unix socket has at most 107 bytes.
        self._socket = Path(tempfile.mkdtemp(prefix="pd-")) / "nursery.sock"
        script = Path(__file__).with_name("peer.py")
        self._process = Process(
            "lmcache nursery", [LMCACHE_PYTHON, script, self._socket], LOGS / "lmcache-nursery.log", LMCACHE_ENV
        )

    @property
    def alive(self) -> bool:
        return self._process.alive

    def fork(self, options: dict[str, Any], log: Path) -> int:
        """Returns the id of a new LMCache process."""
        deadline = time.monotonic() + NURSERY_BOUND_S
        with socket.socket(socket.AF_UNIX) as stream:
            stream.settimeout(NURSERY_BOUND_S)
            while True:
                try:
                    stream.connect(str(self._socket))
                    break
                except OSError:
                    if not self._process.alive or time.monotonic() > deadline:
                        raise self._process.failure("does not take commands") from None
                    time.sleep(0.1)
            with stream.makefile("rw") as lines:
                lines.write(json.dumps({"options": options, "log": str(log.resolve())}) + "\n")
                lines.flush()
                answer = lines.readline()
        if not answer:
            raise self._process.failure("ended instead of a fork")
        return int(answer)


_running: list[_Nursery] = []


def _nursery() -> _Nursery:
    """Returns the nursery of this interpreter, and starts it if there is none."""
    if not _running or not _running[-1].alive:
        _running.append(_Nursery())
    return _running[-1]
