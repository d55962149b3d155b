"""Tests the sidecar's own check, which runs both roles in one process, without an engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness.sidecar import BINARIES


def selftest(transport: str, seconds: int, env: dict[str, str]) -> None:
    done = subprocess.run(
        [BINARIES / "sidecar", "selftest", "--seconds", str(seconds), "--transport", transport],
        env={"VIRTUAL_ENV": sys.prefix, "PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GB/s" in done.stdout


@pytest.mark.parametrize("transport", ["tcp", "nixl"])
def test_selftest(transport: str) -> None:
    """Runs the check that a user runs first."""
    selftest(transport, 2, {})


def test_a_report_in_json_is_nothing_but_json() -> None:
    """Guards a fault: UCX writes its warnings to the standard output by default."""
    done = subprocess.run(
        [BINARIES / "sidecar", "selftest", "--seconds", "1", "--transport", "nixl", "--json"],
        env={"VIRTUAL_ENV": sys.prefix, "PATH": "/usr/bin:/bin", "UCX_PD_UNUSED": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "UCX_PD_UNUSED" in done.stderr, "UCX warns of nothing: the test shows nothing"
    (report,) = json.loads(done.stdout)
    assert report["wrong"] == 0 and report["bytes"] > 0, report


def test_a_second_copy_of_a_library_does_not_spoil_the_end(tmp_path: Path) -> None:
    """Guards a fault: with the system's libibverbs in LD_PRELOAD, each process ended with a segmentation fault. NIXL's
    wheel has a copy of libnl-route, and its destructors call the functions of the copy that the process loads first.
    """
    (wheel,) = Path(sys.prefix).glob("lib/python3*/site-packages/nixl_cu*.libs/libnl-route-3-*")
    mark = wheel.name.removeprefix("libnl-route-3-").split(".")[0]
    first = tmp_path / wheel.name.replace(mark, "0" * len(mark))
    # The linker would not load a library of the same name twice.
    first.write_bytes(wheel.read_bytes().replace(wheel.name.encode(), first.name.encode()))
    for below in wheel.parent.glob("libnl-3-*"):
        (tmp_path / below.name).symlink_to(below)
    selftest("nixl", 1, {"LD_PRELOAD": str(first)})
