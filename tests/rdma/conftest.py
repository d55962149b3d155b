"""Skips the tests of this folder on a machine without emulated RDMA devices."""

from __future__ import annotations

import os

import pytest

# Set by `guest.sh`, in the emulated machine only. The tests slow and cut the network of their devices, so they must not
# run on a machine that has real ones.
IN_MACHINE = os.environ.get("PD_TEST_RDMA") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not IN_MACHINE:
        for item in items:
            if "rdma" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="runs in an emulated machine: make rdma"))
