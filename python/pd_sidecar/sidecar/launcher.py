"""Runs the sidecar as a child of the engine: `"sidecar": "spawn"` in the connector's options.

The child inherits the engine's environment, so one command line sets `UCX_TLS` and `LMCACHE_CONFIG_FILE` for both. If
the child ends, the engine starts it again after a growing pause, and the connector connects again. The child ends with
the engine: `stop` ends it, and if the engine is killed, the kernel ends it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Mapping, Sequence

BINARY_VARIABLE = "PD_SIDECAR_BINARY"


class NoBinaryError(RuntimeError):
    """The sidecar's program is not installed. The text lists the places that were searched."""


def find_binary() -> str:
    """Returns the path of the sidecar's program: from an environment variable, from the folder of Python's program, or
    from PATH.

    Raises `NoBinaryError`.
    """
    named = os.environ.get(BINARY_VARIABLE)
    if named:
        if not os.access(named, os.X_OK):
            raise NoBinaryError(f"{BINARY_VARIABLE}={named} is not a program that this user can run")
        return named
    beside = Path(sys.executable).with_name("sidecar")
    if os.access(beside, os.X_OK):
        return str(beside)
    found = shutil.which("sidecar")
    if found is None:
        raise NoBinaryError(
            f"no program `sidecar` in {beside.parent} or on PATH: install the wheel with the "
            f"binaries, or set {BINARY_VARIABLE}"
        )
    return found


class Child:
    """A running sidecar, watched until `stop`."""

    def __init__(
        self,
        command: Sequence[str],
        logger: logging.Logger,
        variables: Callable[[], Mapping[str, str | None]] | None = None,
    ) -> None:
        """Starts the sidecar, with the variables that `variables` returns added to this process's environment; `None`
        removes a variable. Each start asks again, because another process may have taken a free port since the last
        start.

        Raises `OSError` if the sidecar cannot be started at all.
        """
        self._command = list(command)
        # The sidecar looks for NIXL in this Python's folder, because the environment may not be activated.
        self._environ = {"VIRTUAL_ENV": sys.prefix, **os.environ}
        self._variables = variables or dict
        self._logger = logger
        self._stopping = threading.Event()
        self._process = self._start()
        self._watcher = threading.Thread(target=self._watch, name="pd-sidecar-child", daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int:
        """The id of the current process; it changes with a restart."""
        return self._process.pid

    def stop(self) -> None:
        """Ends the sidecar: first SIGTERM, so that requests under way may end, then SIGKILL."""
        self._stopping.set()
        self._watcher.join()
        self._process.terminate()
        try:
            self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        parent = os.getpid()
        environ = {**self._environ, **self._variables()}
        # Keep the sidecar in the engine's session, so that a signal to the engine's group also ends the sidecar.
        process = subprocess.Popen(
            self._command,
            env={name: value for name, value in environ.items() if value is not None},
            preexec_fn=lambda: _end_with(parent),  # noqa: PLW1509
        )
        self._logger.info("sidecar started as process %d: %s", process.pid, self._command)
        return process

    def _watch(self) -> None:
        pause = FIRST_PAUSE_S
        since = time.monotonic()
        # The kernel ends a child when the thread that started the child ends. The watching thread restarts the child,
        # so this thread runs until `stop`.
        while not self._stopping.wait(LOOK_S):
            code = self._process.poll()
            if code is None:
                continue
            if time.monotonic() - since > STEADY_S:
                pause = FIRST_PAUSE_S
            self._logger.error(
                "sidecar ended with code %d: the engine computes its requests itself and starts it again in %g s",
                code,
                pause,
            )
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, LAST_PAUSE_S)
            since = time.monotonic()
            try:
                self._process = self._start()
            except OSError as error:
                self._logger.error("the engine cannot start the sidecar again: %s", error)


def _end_with(parent: int) -> None:
    """Asks the kernel to end this child when its parent ends. Runs in the child before it executes the sidecar."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # the parent has ended already


PR_SET_PDEATHSIG = 1
GRACE_S = 15.0
LOOK_S = 0.2
FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 30.0
STEADY_S = 60.0
"""The seconds after which a child counts as recovered, so that the next pause is short again."""
