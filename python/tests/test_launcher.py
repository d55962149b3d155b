"""Tests the sidecar as a child process: it starts, is restarted after a crash, and ends with its parent."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pd_sidecar.sidecar import launcher as spawn
from pd_sidecar.sidecar.launcher import Child, NoBinaryError, find_binary

LOGGER = logging.getLogger("test")


def until(condition, bound_s=60.0):
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_ends_when_told():
    child = Child(["sleep", "100"], LOGGER)
    pid = child.pid
    assert alive(pid)
    child.stop()
    assert not alive(pid)


def test_is_started_again(monkeypatch, caplog):
    monkeypatch.setattr(spawn, "FIRST_PAUSE_S", 0.05)
    child = Child(["sleep", "100"], LOGGER)
    first = child.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: child.pid != first and alive(child.pid))
    assert "ended with code -9" in caplog.text
    child.stop()


def test_variables_are_added_and_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("PD_TEST_ONE", "1")
    told = tmp_path / "told"
    script = f"echo ${{PD_TEST_ONE-none}} $PD_TEST_TWO > {told}.new; mv {told}.new {told}; sleep 100"
    child = Child(["sh", "-c", script], LOGGER, lambda: {"PD_TEST_ONE": None, "PD_TEST_TWO": "2"})
    until(told.exists)
    assert told.read_text() == "none 2\n"
    child.stop()


def test_a_killed_parent_takes_it_along(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import logging, sys, time\n"
        "from pd_sidecar.sidecar.launcher import Child\n"
        "child = Child(['sleep', '100'], logging.getLogger())\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    until(lambda: not alive(pid))
    parent.stdout.close()


def test_the_binary_is_looked_for(monkeypatch, tmp_path):
    program = tmp_path / "sidecar"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("PD_SIDECAR_BINARY", raising=False)
    with pytest.raises(NoBinaryError, match="install the wheel"):
        find_binary()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binary() == str(program)
    monkeypatch.setenv("PD_SIDECAR_BINARY", str(tmp_path / "absent"))
    with pytest.raises(NoBinaryError, match="is not a program"):
        find_binary()
