"""Starts the distributed stores that can lie below `pd-store`: Redis, a Redis cluster, and an S3 server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import warnings
from pathlib import Path
from xml.etree import ElementTree

import pytest

from harness.ports import free_port
from harness.process import Process
from harness.redis import PROGRAM, ask, redis_server
from harness.sidecar import ROOT
from harness.waiting import until

S3_VENV = Path(os.environ.get("PD_TEST_S3_VENV", ROOT / ".venv-s3"))
BUCKET = "kv-cache"
REDIS_LOG = "remote-redis.log"


class RemoteStore:
    """One distributed store. `flags` are those of a `pd-store` that uses it."""

    flags: list[str | Path]

    def __init__(self) -> None:
        self.processes: list[Process] = []

    def start(self) -> None:
        raise NotImplementedError

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.signal(number)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        self.processes = []

    def names(self) -> list[str]:
        """Returns the names of all values."""
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        raise NotImplementedError

    def write(self, name: str, value: bytes) -> None:
        raise NotImplementedError


class RedisServer(RemoteStore):
    """One Redis, which keeps nothing when it ends."""

    def __init__(self, folder: Path, logs: Path, *options: str) -> None:
        super().__init__()
        need_redis()
        self.port = free_port()
        self.flags = ["--remote", f"redis://127.0.0.1:{self.port}"]
        self._folder, self._logs, self._options = folder, logs, options

    def start(self) -> None:
        self.processes = [redis_server(self.port, self._folder, self._logs / REDIS_LOG, *self._options)]

    def names(self) -> list[str]:
        return [name.decode() for name in ask(self.port, b"KEYS", b"*")]

    def read(self, name: str) -> bytes:
        return bytes(ask(self.port, b"GET", name.encode()))

    def write(self, name: str, value: bytes) -> None:
        ask(self.port, b"SET", name.encode(), value)


class RedisCluster(RemoteStore):
    """A cluster of three Redis servers. A restarted one finds its place again, and no values."""

    def __init__(self, folder: Path, logs: Path) -> None:
        super().__init__()
        need_redis()
        self._ports = [free_port() for _ in range(3)]
        self._buses = [free_port() for _ in range(3)]
        # The client learns the other nodes from the first.
        self.flags = ["--remote", f"redis-cluster://127.0.0.1:{self._ports[0]}"]
        self._folder, self._logs = folder, logs
        self._made = False

    def start(self) -> None:
        self.processes = [
            redis_server(
                port, self._folder, self._logs / REDIS_LOG, "--cluster-enabled", "yes", "--cluster-port", str(bus),
                "--cluster-config-file", f"nodes-{port}.conf", "--cluster-node-timeout", "2000",
            )
            for port, bus in zip(self._ports, self._buses, strict=True)
        ]  # fmt: skip
        if not self._made:
            bounds = [0, 5461, 10923, 16384]
            for at, port in enumerate(self._ports):
                ask(port, b"CLUSTER", b"ADDSLOTSRANGE", b"%d" % bounds[at], b"%d" % (bounds[at + 1] - 1))
                if at:
                    first = [b"127.0.0.1", b"%d" % self._ports[0], b"%d" % self._buses[0]]
                    ask(port, b"CLUSTER", b"MEET", *first)
            self._made = True
        until(
            "the cluster is not made",
            lambda: all(
                b"cluster_state:ok" in (info := ask(port, b"CLUSTER", b"INFO")) and b"cluster_known_nodes:3" in info
                for port in self._ports
            ),
        )

    def names(self) -> list[str]:
        return [name.decode() for port in self._ports for name in ask(port, b"KEYS", b"*")]

    def read(self, name: str) -> bytes:
        return bytes(ask(self._node(name), b"GET", name.encode()))

    def write(self, name: str, value: bytes) -> None:
        ask(self._node(name), b"SET", name.encode(), value)

    def _node(self, name: str) -> int:
        slot = int(ask(self._ports[0], b"CLUSTER", b"KEYSLOT", name.encode()))
        return self._ports[min(slot // 5461, 2)] if slot != 10922 else self._ports[1]


class S3Server(RemoteStore):
    """moto's server, which keeps everything in memory. With `closed` it checks signatures as Amazon does."""

    def __init__(self, logs: Path, closed: bool = False) -> None:
        super().__init__()
        need_s3()
        self._logs, self._closed = logs, closed
        self.url = f"http://127.0.0.1:{free_port()}"
        self.flags = ["--remote", f"s3://{BUCKET}", "--remote-endpoint", self.url]

    def start(self) -> None:
        program = S3_VENV / "bin" / "moto_server"
        # Besides the bucket, a closed server takes three requests without a key: those that make the key.
        env = {"INITIAL_NO_AUTH_ACTION_COUNT": "4"} if self._closed else {}
        command: list[str | Path] = [program, "-H", "127.0.0.1", "-p", self.url.rpartition(":")[2]]
        self.processes = [Process("moto", command, self._logs / "moto.log", env)]
        until("it does not listen", self._listens, process=self.processes[0])
        self._call("PUT", f"/{BUCKET}")

    def make_key(self) -> tuple[str, str]:
        """Makes a user with all rights. Returns the id and the secret of its key."""
        scope = "AWS4-HMAC-SHA256 Credential=x/20200101/us-east-1/iam/aws4_request, SignedHeaders=host, Signature=x"
        form = {"Content-Type": "application/x-www-form-urlencoded", "Authorization": scope}
        rights = '{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"*","Resource":"*"}]}'
        made = b""
        for action in (
            "Action=CreateUser",
            f"Action=PutUserPolicy&PolicyName=p&PolicyDocument={urllib.parse.quote(rights)}",
            "Action=CreateAccessKey",
        ):
            made = self._call("POST", "/", f"{action}&UserName=u&Version=2010-05-08".encode(), form)
        found = {tag.tag.rpartition("}")[2]: tag.text or "" for tag in ElementTree.fromstring(made).iter()}
        return found["AccessKeyId"], found["SecretAccessKey"]

    def names(self) -> list[str]:
        listed = self._call("GET", f"/{BUCKET}?list-type=2")
        return [tag.text or "" for tag in ElementTree.fromstring(listed).iter() if tag.tag.endswith("}Key")]

    def read(self, name: str) -> bytes:
        return self._call("GET", f"/{BUCKET}/{name}")

    def write(self, name: str, value: bytes) -> None:
        self._call("PUT", f"/{BUCKET}/{name}", value)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2]))):
            return True
        return False

    def _call(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
        # The owner of all values. An open server does not look at the signature.
        scope = "AWS4-HMAC-SHA256 Credential=test/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=x"
        headers = headers or {"Authorization": scope}
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {error.code} {error.read()!r}") from error


def need_redis() -> None:
    if not PROGRAM.exists():
        _make("Redis", [ROOT / "scripts" / "redis.sh", ROOT / "target" / "redis"])


def need_s3() -> None:
    _make("the S3 server", [ROOT / "scripts" / "venv-s3.sh", S3_VENV, sys.executable])


def _make(name: str, command: list[str | Path]) -> None:
    made = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if made.returncode:
        # Loud: the summary of pytest shows the reason, and the warning is printed in any case.
        warnings.warn(f"SKIPPED: {name} cannot be had: {made.stderr}", stacklevel=2)
        pytest.skip(f"{name} cannot be had: {made.stderr.strip()[-200:]}")
