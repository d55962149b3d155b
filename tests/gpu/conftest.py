"""Makes pytest succeed on a host without GPUs, where every module of this folder is skipped with a message.

pytest itself treats a run without any test as an error.
"""

from __future__ import annotations

import pytest

from gpu.setting import gpus


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and not gpus():
        session.exitstatus = pytest.ExitCode.OK
