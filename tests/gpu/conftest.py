"""Without a GPU every module here is skipped and says so: pytest calls that an error, we do not."""

from __future__ import annotations

import pytest

from gpu.setting import gpus


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and not gpus():
        session.exitstatus = pytest.ExitCode.OK
