"""The folder of a run's log files."""

from __future__ import annotations

import os

from harness.sidecar import ROOT

# Each worker of pytest-xdist has its own folder, because the parts of two workers may have the same names.
LOGS = ROOT / "target" / "test-logs" / os.environ.get("PYTEST_XDIST_WORKER", "")
