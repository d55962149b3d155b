"""Starts the metadata servers that a `mooncake.json` can name."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.logs import LOGS
from harness.ports import free_port
from harness.process import Process
from harness.redis import PROGRAM, redis_server
from harness.sidecar import ROOT

ETCD = Path(os.environ.get("ETCD", ROOT / "target" / "etcd" / "usr" / "bin" / "etcd"))


@contextmanager
def etcd(folder: Path) -> Iterator[str]:
    if not ETCD.exists():
        subprocess.run([ROOT / "scripts" / "etcd.sh", ROOT / "target" / "etcd"], check=True, timeout=120)
    client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    flags: list[str | Path] = [
        "--name", "one", "--data-dir", folder / "etcd",
        "--listen-client-urls", client, "--advertise-client-urls", client,
        "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"one={peer}",
    ]  # fmt: skip
    process = Process("etcd", [ETCD, *flags], LOGS / "etcd.log")
    yield client.removeprefix("http://")
    process.stop()


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    if not PROGRAM.exists():
        subprocess.run([ROOT / "scripts" / "redis.sh", ROOT / "target" / "redis"], check=True, timeout=120)
    port = free_port()
    process = redis_server(port, folder, LOGS / "redis.log")
    yield f"redis://127.0.0.1:{port}"
    process.stop()
