"""The fixtures of all tests with processes. Tests in `processes` start no vLLM engine; tests in `engines` do."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.logs import LOGS


@pytest.fixture(scope="session", autouse=True)
def logs() -> Path:
    """The folder of the log files of all parts. The fixture empties it once, at the start."""
    LOGS.mkdir(parents=True, exist_ok=True)
    for log in LOGS.glob("*.log"):
        log.unlink()
    return LOGS
