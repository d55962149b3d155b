"""Tests the shipped configuration files with both programs, and the effect of each LMCache PD key in a sidecar."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness.drop_in.bare import BareReceiver, BareSender
from harness.drop_in.chunks import Prompt
from harness.drop_in.nodes import LmcachePeer, LmcacheReceiver, LmcacheSender, Notices
from harness.ports import fixed
from harness.sidecar import BINARIES, ROOT

from pd_sidecar.sidecar.wire import Target

from .test_names import ALGORITHMS, lmcache

CONFIGS = ROOT / "configs"
TARGET = Target("localhost", 7300, 7400)
RECEIVER: dict[str, object] = {
    "pd_role": "receiver", "pd_buffer_size": 1 << 20, "pd_peer_host": "127.0.0.1",
    "pd_peer_init_port": 7300, "pd_peer_alloc_port": 7400,
}  # fmt: skip


class _FixedNotices(Notices):
    """Also listens at the port that the shipped files name."""

    def __init__(self) -> None:
        super().__init__()
        self._socket.bind("tcp://127.0.0.1:7500")


class _LmcacheShippedReceiver(LmcacheReceiver):
    def __init__(self) -> None:
        self.target = TARGET
        LmcachePeer.__init__(self, "receiver", "async", {}, file=CONFIGS / "lmcache-decoder-config.yaml")


class _LmcacheShippedSender(LmcacheSender):
    def __init__(self) -> None:
        LmcachePeer.__init__(self, "sender", "async", {}, file=CONFIGS / "lmcache-prefiller-config.yaml")


# LMCache's agents connect over UCX's TCP. A sidecar accepts UCX's TCP only with this option.
CONSENT = {"PD_SIDECAR_NIXL_OVER_TCP": "trusted"}


@pytest.mark.parametrize("lmcache_sends", [False, True])
def test_the_shipped_files_work_with_both_programs(tmp_path: Path, lmcache_sends: bool) -> None:
    with fixed("ports of the shipped files"):
        moved_with_the_shipped_files(tmp_path, lmcache_sends)


def moved_with_the_shipped_files(tmp_path: Path, lmcache_sends: bool) -> None:
    sender: LmcacheSender | BareSender
    receiver: LmcacheReceiver | BareReceiver
    notices = _FixedNotices()
    if lmcache_sends:
        receiver = BareReceiver(
            "shipped-receiver",
            ["--config", CONFIGS / "lmcache-decoder-config.yaml"],
            "127.0.0.1:7900",
            tmp_path,
            CONSENT,
        )
        receiver.target = TARGET
        sender = _LmcacheShippedSender()
    else:
        receiver = _LmcacheShippedReceiver()
        sender = BareSender(
            "shipped-sender",
            ["--config", CONFIGS / "lmcache-prefiller-config.yaml"],
            "127.0.0.1:7910",
            tmp_path,
            CONSENT,
        )
    try:
        prompt = Prompt.of_chunks(5, last=7)
        put = sender.put("shipped", TARGET, prompt)
        assert (put.written, put.error) == (5, None)
        assert notices.wait("shipped") is not None
        assert receiver.get("shipped", prompt) == prompt.sums
    finally:
        sender.stop()
        receiver.stop()
        notices.close()


# Each entry has a key, its value, a row and a text. The row of the resulting configuration must have this text. If the
# row is "ignored" or "refused", the report must name the key, with a reason that contains the text.
EFFECTS: list[tuple[str, object, str, str]] = [
    ("pd_role", "receiver", "pd_role", "receiver"),
    ("pd_buffer_size", 8 << 20, "pd_buffer_size", "8388608 (8 MiB)"),
    ("pd_buffer_device", "cuda", "pd_buffer_device", "cuda"),
    ("pd_peer_host", "localhost", "pd_peer_host", "localhost"),
    ("pd_peer_init_port", [7301], "pd_peer_init_port", "[7301]"),
    ("pd_peer_alloc_port", "7401", "pd_peer_alloc_port", "[7401]"),
    ("pd_peer_query_port", 7450, "pd_peer_query_port", "[7450]"),
    ("pd_proxy_host", "localhost", "sidecar.proxy", "localhost:7501"),
    ("pd_proxy_port", 7501, "sidecar.proxy", "localhost:7501"),
    ("pd_allocation_timeout_sec", 2.5, "sidecar.wait_ms", "2500"),
    ("pd_shutdown_timeout_sec", 7, "sidecar.drain_timeout_ms", "7000"),
    ("pd_skip_proxy_notification", True, "pd_skip_proxy_notification", "true"),
    ("pd_max_prefill_len", 4096, "pd_max_prefill_len", "4096"),
    ("nixl_backends", ["UCX"], "nixl_backends", "[UCX]"),
    ("nixl_role", "receiver", "pd_role", "receiver"),
    ("nixl_buffer_size", 1 << 20, "pd_buffer_size", "1048576 (1 MiB)"),
    ("nixl_buffer_device", "cuda", "pd_buffer_device", "cuda"),
    ("nixl_peer_host", "127.0.0.1", "pd_peer_host", "127.0.0.1"),
    ("nixl_peer_init_port", 7300, "pd_peer_init_port", "[7300]"),
    ("nixl_peer_alloc_port", 7400, "pd_peer_alloc_port", "[7400]"),
    ("nixl_proxy_host", "localhost", "sidecar.proxy", "localhost:7501"),
    ("nixl_proxy_port", 7501, "sidecar.proxy", "localhost:7501"),
    # Keys without effect; the report gives the reason.
    ("pd_backend_mode", "sync", "ignored", "does nothing"),
    ("pd_condition_poll_interval_sec", 0.01, "ignored", "does not poll"),
    # Values that the sidecar refuses; the error names the key.
    ("pd_bidirectional", True, "refused", "from prefill to decode only"),
    ("pd_backend_mode", "both", "refused", "no such backend"),
    ("nixl_backends", ["GDS"], "refused", "UCX backend only"),
    ("nixl_peer_port", 7300, "refused", "two ports"),
    ("pd_role", "proxy", "refused", "possible values"),
]
PARTNERS: dict[str, dict[str, object]] = {
    "pd_proxy_host": {"pd_proxy_port": 7501}, "nixl_proxy_host": {"pd_proxy_port": 7501},
    "pd_proxy_port": {"pd_proxy_host": "localhost"}, "nixl_proxy_port": {"pd_proxy_host": "localhost"},
}  # fmt: skip


def test_no_pd_key_of_lmcaches_is_missing_here() -> None:
    names = {*lmcache("0", ALGORITHMS)["config"], *lmcache("0", ALGORITHMS)["aliases"]}
    theirs = {name for name in names if name.startswith(("pd_", "nixl_"))}
    assert theirs == {key for key, *_ in EFFECTS}


@pytest.mark.parametrize(("key", "value", "row", "text"), EFFECTS)
@pytest.mark.parametrize("by_variable", [False, True])
def test_each_pd_key_does_what_it_says(
    tmp_path: Path, key: str, value: object, row: str, text: str, by_variable: bool
) -> None:
    own = {f"nixl_{name.removeprefix('pd_')}" for name in RECEIVER}
    base = {k: v for k, v in RECEIVER.items() if k != key and not (key in own and k == f"pd_{key[5:]}")}
    values = base | PARTNERS.get(key, {})
    variables: dict[str, str] = {}
    if by_variable:
        listed = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        variables = {f"LMCACHE_{key.upper()}": listed}
    else:
        values[key] = value
    file = tmp_path / "x.yaml"
    file.write_text(json.dumps(values))
    # As with LMCache, an environment variable names the file.
    environ = {k: v for k, v in os.environ.items() if not k.startswith("LMCACHE_")}
    environ |= variables | {"LMCACHE_CONFIG_FILE": str(file)}
    command: list[str | Path] = [BINARIES / "sidecar", "check-config", "--json"]
    run = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    report: dict[str, Any] = json.loads(run.stdout)
    if row == "refused":
        assert run.returncode == 64
        assert key in run.stderr and text in run.stderr, run.stderr
        return
    assert run.returncode == 0, run.stderr
    if row == "ignored":
        assert text in {entry["key"]: entry["why"] for entry in report["ignored"]}[key]
        return
    assert {entry["key"]: entry["value"] for entry in report["values"]}[row] == text
