"""Tests that the page of differences shows the list which the differential suite allows."""

from __future__ import annotations

import os

from harness.differential.allowed import table
from harness.sidecar import ROOT

PAGE = ROOT / "docs" / "proxy" / "differences.md"


def test_the_page_has_the_table() -> None:
    """With `UPDATE=1` the test writes the table into the page."""
    page = PAGE.read_text()
    head, begin, _ = page.partition("| difference | reason |")
    assert begin, "the page has no table"
    expect = head + table()
    if os.environ.get("UPDATE") == "1":
        PAGE.write_text(expect)
    assert PAGE.read_text() == expect, "run this test with UPDATE=1"
