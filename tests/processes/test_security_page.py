"""Holds docs/security.md to the code: each test that the page names exists."""

from __future__ import annotations

import re

from harness.sidecar import ROOT


def test_each_test_that_the_page_names_exists() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`([\w/]+\.(?:rs|py))` `(\w+)`", text)
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf"\b(?:fn|def) {name}\(", (ROOT / file).read_text()), f"{file} has no test {name}"
    # A row without a test says so.
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == 6]
    assert all(re.search(r"`\w+` \||`\w+`, |\| none \|", row) for row in rows if not row.startswith("| channel"))
