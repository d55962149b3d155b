#!/usr/bin/env python3
"""Checks of the tree that no linter has: lengths of files, paths of one machine, leftovers.

Run from anywhere; prints every finding as `file:line: text` and exits 1 if there is one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A file longer than this holds more than one noun. Committed output of a generator is exempt.
MAX_LINES = 500
# Tables of cases: one noun all the same.
MAX_TEST_LINES = 1000
LONG_BY_NATURE = ("Cargo.lock", "LICENSE", "nixl-sys/src/bindings.rs")

# Files that a user reads or that run on his machine must not name somebody else's.
MACHINE_PATH = re.compile(r"(?<![\w.~$}{/-])/(?:home|root|work|Users|mnt|opt)/[\w.]")
LEFTOVER = re.compile(r"\b(?:FIXME|XXX|HACK)\b|\bdbg!\(|^<{7} |^>{7} ")

TEXT = {".rs", ".py", ".sh", ".md", ".toml", ".yaml", ".yml", ".h", ".txt", ""}


def tracked() -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]


def findings(name: str) -> list[str]:
    path = ROOT / name
    if path.suffix not in TEXT:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []
    found = []
    limit = MAX_TEST_LINES if path.name == "tests.rs" else MAX_LINES
    if len(lines) > limit and name not in LONG_BY_NATURE and path.suffix in {".rs", ".py", ".sh"}:
        found.append(f"{name}:{len(lines)}: longer than {limit} lines")
    for number, line in enumerate(lines, start=1):
        if name != "scripts/tidy.py" and LEFTOVER.search(line):
            found.append(f"{name}:{number}: leftover: {line.strip()}")
        if MACHINE_PATH.search(line):
            found.append(f"{name}:{number}: path of one machine: {line.strip()}")
        if line != line.rstrip() and path.suffix != ".md" and name != "LICENSE":
            found.append(f"{name}:{number}: trailing white space")
    return found


def main() -> int:
    found = [line for name in tracked() for line in findings(name)]
    print("\n".join(found) or "tidy: nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
