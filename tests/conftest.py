"""The fixtures of all tests with processes. `processes` starts no vLLM engine, `engines` does."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.logs import LOGS


@pytest.fixture(scope="session", autouse=True)
def logs() -> Path:
    """The folder of all parts' log files, emptied once."""
    LOGS.mkdir(parents=True, exist_ok=True)
    for log in LOGS.glob("*.log"):
        log.unlink()
    return LOGS
