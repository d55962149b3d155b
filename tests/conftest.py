"""The fixtures of all tests with processes. The tests in `processes` start no vLLM engine; the tests in `engines` start
vLLM engines.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.logs import LOGS


@pytest.fixture(scope="session", autouse=True)
def logs() -> Path:
    """The folder of the log files of all parts. The fixture empties the folder once, at the start."""
    LOGS.mkdir(parents=True, exist_ok=True)
    for log in LOGS.glob("*.log"):
        log.unlink()
    return LOGS
