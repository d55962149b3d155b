"""Tests two hosts with keys: their sidecars listen on their own addresses without `--insecure`.

The other host is a network namespace of this host. No engine runs: a client at each sidecar takes the place of an
engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.client import call
from harness.ports import free_port
from harness.sidecar import NO_PUSH, Sidecar, SidecarOptions
from test_groups import LAYOUT, Pair
from test_keys import Fleet
from test_two_hosts import ITS_END, OUR_END, end, other_host

SLOTS = 16

pytestmark = pytest.mark.skipif(NO_PUSH, reason="nothing can be pushed")


class FarSidecar(Sidecar):
    """A sidecar on the other host, whose pages only clients of that host may read."""

    def _requests(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._page("/requests")
        return rows

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self._page("/status")
        return status

    def _page(self, path: str) -> Any:
        # The first four words enter the host. The others begin a process namespace, which this client does not need.
        enter = self.options.within[:4]
        read = f"import urllib.request; print(urllib.request.urlopen('{self.admin}{path}').read().decode())"
        shown = subprocess.run([*enter, sys.executable, "-c", read], check=True, capture_output=True, text=True)
        return json.loads(shown.stdout)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    fleet = Fleet(tmp_path)
    hosts = {"sender": ITS_END, "receiver": OUR_END}
    entries = {fleet.key(role): {"name": role, "roles": [role], "hosts": [host]} for role, host in hosts.items()}
    (tmp_path / "roster.yaml").write_text(json.dumps(entries))
    with other_host() as within:
        sides = []
        for role, host in hosts.items():
            options = SidecarOptions(
                role,
                SLOTS * LAYOUT.chunk_bytes,
                transport="tcp",
                keys=fleet.settings(role),
                within=within if role == "sender" else [],
            )
            kind = FarSidecar if role == "sender" else Sidecar
            side = kind(options, tmp_path, tmp_path, name=role)
            side.host = host
            side.admin = f"http://{host}:{free_port()}"
            sides.append(side)
        sender, receiver = sides
        try:
            receiver.start()
            sender.start()
            yield Pair(sender, receiver)
        finally:
            end(sender)
            receiver.stop()


def test_two_hosts_need_no_consent_and_move_sealed_kv(pair: Pair) -> None:
    pair.move("r-0", tokens=1000, have=0, slots=SLOTS)
    record = pair.receiver.records()[-1]
    assert record["req"] == "r-0" and record["transport"] == "tcp" and record["bytes"] > 0
    for side in (pair.sender, pair.receiver):
        assert side.process is not None
        assert "INSECURE" not in side.process.log.read_text()
    # A client of another host reads the sender's metrics, but not its pages.
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{pair.sender.admin}/status", timeout=30.0)
    assert call(f"{pair.sender.admin}/metrics")[0] == 200
