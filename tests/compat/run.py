#!/usr/bin/env python3
"""Runs this connector's unit tests over the Python trees of several versions of vLLM: `make compat`.

    run.py FOLDER VERSION...

FOLDER/VERSION has the tree of a version, without compiled parts (scripts/compat.sh). Only the tests that use vLLM's
classes run. They show that the connector fits vLLM's interface: constructors, calls, block managers, outputs. They do
not show that an engine works. Writes target/compat.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "python" / "tests"
BOUND_S = 900
SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|errors?)")


def main() -> int:
    folder, *versions = sys.argv[1:]
    lines = ["| vLLM | passed | failed | skipped | first failures |", "|---|---|---|---|---|"]
    all_passed = True
    for version in versions:
        counts, failures = run(Path(folder).resolve() / version)
        failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
        all_passed &= failed == 0 and counts.get("passed", 0) > 0
        cells = (version, counts.get("passed", 0), failed, counts.get("skipped", 0), "<br>".join(failures[:3]))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        print(lines[-1], flush=True)
    (ROOT / "target" / "compat.md").write_text("\n".join(lines) + "\n")
    return 0 if all_passed else 1


def run(tree: Path) -> tuple[dict[str, int], list[str]]:
    """Runs the tests over one tree. Returns the numbers of tests by result, and the failures."""
    files = [path for path in sorted(TESTS.glob("test_*.py")) if uses_vllm(path)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *map(str, files)]
    env = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        command, check=False, cwd=ROOT / "python", env=env, capture_output=True, text=True, timeout=BOUND_S
    )
    output = done.stdout.splitlines() or [done.stderr]
    counts = {name: int(number) for number, name in SUMMARY.findall(output[-1])}
    failed = [line for line in output if line.startswith(("FAILED tests", "ERROR tests"))]
    failures = [line.removeprefix("FAILED ").split(" - ")[0] for line in failed]
    return counts, failures


def uses_vllm(path: Path) -> bool:
    """Returns true if a test uses vLLM's classes, itself or through the scheduler's half."""
    text = path.read_text()
    return "from vllm." in text or "pd_sidecar.scheduler" in text


if __name__ == "__main__":
    sys.exit(main())
