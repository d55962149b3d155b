"""Starts child processes and makes sure that none of them outlives the tests.

Each child leads its own process group, so that the child's own processes end together with it (an engine has four
processes). A group ends in one of three ways: `stop` ends it, the interpreter ends it at exit, or a guardian process
(`reaper.py`) ends it after the interpreter was killed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

# Time between SIGTERM and SIGKILL. vLLM needs about 3 s to end on two cores.
STOP_GRACE_S = 30.0

# Time in which a killed process must disappear.
KILL_GRACE_S = 60.0


class ProcessFailed(RuntimeError):
    """Reports that a child ended, or was not ready in time. The text ends with the last lines of the child's output."""


class Child(Protocol):
    """The handle of a started process, as `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class Process:
    """One child process. The constructor starts the process and appends its stdout and stderr to `log`."""

    def __init__(
        self, name: str, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self.command = [str(part) for part in command]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            output.write(f"\n$ {' '.join(self.command)}\n".encode())
            output.flush()
            self._log_start = output.tell()
        self._env = {**os.environ, **(env or {})}
        self._child = self._launch()
        self.pid = self._child.pid
        _groups.add(self)

    def _launch(self) -> Child:
        """Starts the process as the leader of a new process group."""
        with self.log.open("ab") as output:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._child.poll() is None

    @property
    def exit_code(self) -> int | None:
        return self._child.poll()

    def output(self) -> str:
        """Returns the output of this process since its start."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.output().splitlines()[-lines:])

    def failure(self, what: str) -> ProcessFailed:
        """Returns an error with the text `what` and the last lines of the process's output."""
        return ProcessFailed(f"{self.name}: {what}\n--- last lines of {self.log} ---\n{self.tail()}\n---")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the group's leader only."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        """Waits for the end and returns the exit code. Raises `ProcessFailed` after `timeout_s`."""
        try:
            return self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self.failure(f"still running {timeout_s:g} s after it was told to end") from None

    def kill(self) -> None:
        """Kills the whole group with SIGKILL. Returns when no process of the group is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + KILL_GRACE_S
        while not self._gone():
            if time.monotonic() > deadline:
                raise self.failure(f"processes {group_members(self.pid)} of its group survive SIGKILL")
            time.sleep(0.02)
        _groups.discard(self)

    def stop(self) -> None:
        """Sends SIGTERM to the leader, which ends its children. Kills the remaining processes after `STOP_GRACE_S`."""
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE_S
        while time.monotonic() < deadline and not self._gone():
            time.sleep(0.02)
        self.kill()

    def cpu_seconds(self) -> float:
        """Returns the CPU time of all running processes of the group."""
        ticks = 0
        for pid in group_members(self.pid):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _gone(self) -> bool:
        return self._child.poll() is not None and not group_members(self.pid)


class Part:
    """A part of the system. A part keeps its name, ports and folder when its process is restarted."""

    process: Process | None = None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.alive

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def stop(self) -> None:
        """Stops the process with SIGTERM. Does nothing if the process was never started."""
        if self.process is not None:
            self.process.stop()

    def kill(self) -> None:
        """Kills the process with SIGKILL, as a crash would."""
        assert self.process is not None
        self.process.kill()


def group_members(group: int) -> list[int]:
    """Returns the ids of the group's processes, without zombies."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z" and int(fields[2]) == group:
                members.append(int(entry.name))
    return members


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise `KeyboardInterrupt` inside the block, so that `finally` blocks run."""

    def unwind(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = {number: signal.signal(number, unwind) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Groups:
    """The groups that this interpreter has started and that have not ended. The guardian process has the same list."""

    def __init__(self) -> None:
        self._running: set[Process] = set()
        self._guardian: subprocess.Popen[bytes] | None = None

    def add(self, process: Process) -> None:
        if self._guardian is None:
            self._guardian = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("reaper.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
            atexit.register(self.end_all)
        self._running.add(process)
        self._tell(f"+{process.pid}")

    def discard(self, process: Process) -> None:
        if process in self._running:
            self._running.discard(process)
            self._tell(f"-{process.pid}")

    def end_all(self) -> None:
        for process in list(self._running):
            process.kill()
        if self._guardian is not None and self._guardian.stdin is not None:
            self._guardian.stdin.close()
            self._guardian.wait()

    def _tell(self, line: str) -> None:
        assert self._guardian is not None and self._guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guardian.stdin.write(line.encode() + b"\n")
            self._guardian.stdin.flush()


_groups = _Groups()


def leave_running() -> list[int]:
    """Lets all children outlive this interpreter. Returns their process groups."""
    groups = sorted(process.pid for process in _groups._running)
    for process in list(_groups._running):
        _groups.discard(process)
    return groups
