"""Tests the sidecar's own check, which runs both roles in one process, without an engine."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness.sidecar import BINARIES


@pytest.mark.parametrize("transport", ["tcp", "nixl"])
def test_selftest(transport: str) -> None:
    """Runs the check that a user runs first."""
    done = subprocess.run(
        [BINARIES / "sidecar", "selftest", "--seconds", "2", "--transport", transport],
        env={"VIRTUAL_ENV": sys.prefix, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GB/s" in done.stdout
