"""Runs the sidecar binary."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.client import call, get_json
from harness.metrics import Metrics
from harness.ports import free_port
from harness.process import Part, Process

ROOT = Path(__file__).resolve().parent.parent.parent
# The folder of our programs. The tests use the build that the unit tests have compiled already, so that `make test`
# compiles everything only once. The demo sets PD_BINARIES to the folder of the release build, benchmarks and GPU
# tests to the one of the profile `dist`.
_TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
BINARIES = Path(os.environ.get("PD_BINARIES") or _TARGET / "debug")

# Tokens per chunk: the default of LMCache and of the sidecar.
CHUNK_TOKENS = 256

# An emulated machine is many times slower; `tests/rdma/guest.sh` sets this factor for the bounds of starts.
SLOWNESS = float(os.environ.get("PD_TEST_SLOWNESS", "1"))
START_BOUND_S = 60.0 * SLOWNESS

# If PD_TEST_NO_PUSH is 1, every sidecar runs with --no-push. Every test that checks a transfer must then fail.
NO_PUSH = os.environ.get("PD_TEST_NO_PUSH") == "1"


@dataclass
class SidecarOptions:
    """The options of a sidecar. A test may change them between `stop` and `start`, except `ranks`."""

    role: str
    buffer_bytes: int
    engine_url: str = "http://127.0.0.1:1"
    proxy: str | None = None
    transport: str = "auto"
    # The value of pd_buffer_device.
    device: str = "cpu"
    # Number of ranks, each with its own buffer. The constructor chooses the ports, so this number cannot change later.
    ranks: int = 1
    no_push: bool = NO_PUSH
    # Keys below `sidecar:` in the configuration file.
    keys: dict[str, object] = field(default_factory=dict)
    # LMCache's keys, at the top level of the configuration file.
    lmcache: dict[str, object] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    # A command that runs the binary, for example in another network namespace. If the command is empty, the binary runs
    # directly.
    within: list[str] = field(default_factory=list)


class Sidecar(Part):
    """One sidecar. The sidecar keeps its ports, its socket and its configuration file when its process restarts."""

    def __init__(self, options: SidecarOptions, folder: Path, logs: Path, name: str | None = None) -> None:
        self.options = options
        self.name = name or f"{options.role}-sidecar"
        self.host = "127.0.0.1"
        self.init_ports = [free_port() for _ in range(options.ranks)]
        self.alloc_ports = [free_port() for _ in range(options.ranks)]
        # The data port of rank 0. With several ranks the next port numbers must be free, too, so 0 lets the system
        # choose the ports.
        self.tcp_port = free_port() if options.ranks == 1 else 0
        self.admin = f"http://127.0.0.1:{free_port()}"
        self.socket = folder / f"{self.name}.sock"
        self._config = folder / f"{self.name}.yaml"
        self._logs = logs

    @property
    def init_port(self) -> int:
        """Returns the handshake port of rank 0."""
        return self.init_ports[0]

    @property
    def alloc_port(self) -> int:
        """Returns the allocation port of rank 0."""
        return self.alloc_ports[0]

    def start(self) -> None:
        """Starts the sidecar and returns when its admin server answers. `/ready` needs an engine and comes later."""
        assert self.process is None or not self.process.alive
        self.configure()
        self.process = Process(
            self.name,
            [*self.options.within, BINARIES / "sidecar", *self.arguments()],
            self._logs / f"{self.name}.log",
            self._env(),
        )
        self._until(lambda: self._answers("/health"), START_BOUND_S, "the admin server does not answer")

    def configure(self) -> Path:
        """Writes the configuration file and returns its path, for a test that starts the binary itself."""
        self._config.write_text(self._yaml())
        return self._config

    def arguments(self) -> list[str]:
        options = self.options
        arguments = [
            "--role", options.role, "--config", str(self._config), "--transport", options.transport,
            "--engine-url", options.engine_url,
        ]  # fmt: skip
        if options.no_push:
            arguments.append("--no-push")
        return arguments + options.flags

    def wait_ready(self, bound_s: float = 60.0) -> None:
        self._until(lambda: self._answers("/ready"), bound_s, "not ready")

    def restart(self) -> None:
        """Stops the sidecar and starts it with the current options."""
        self.stop()
        self.start()

    def metrics(self) -> Metrics:
        return Metrics.scrape(f"{self.admin}/metrics")

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = get_json(f"{self.admin}/status")
        return status

    def records(self) -> list[dict[str, Any]]:
        """Returns the records of the last 256 ended requests, oldest first."""
        return [row for row in self._requests() if "kept_ms" not in row]

    def kept(self) -> list[dict[str, Any]]:
        """Returns the requests whose KV the engine keeps until a decode side fetches it, longest kept first."""
        return [row for row in self._requests() if "kept_ms" in row]

    def _requests(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = get_json(f"{self.admin}/requests")
        return rows

    def record(self, request_id: str, bound_s: float = 30.0) -> dict[str, Any]:
        """Returns the record of a request. If there are several ranks, returns the record of the last rank.

        Waits up to `bound_s`, because the sidecar may write the record a moment after the client's answer.
        """
        return self.record_of_each_rank(request_id, bound_s)[-1]

    def record_of_each_rank(self, request_id: str, bound_s: float = 30.0) -> list[dict[str, Any]]:
        """Returns the records of a request, one per rank, in the order of the ranks.

        Waits up to `bound_s`, because the sidecar may write the records a moment after the client's answer.
        """
        deadline = time.monotonic() + bound_s
        while True:
            found = {record["rank"]: record for record in self.records() if record["req"] == request_id}
            if len(found) == self.options.ranks:
                return [found[rank] for rank in sorted(found)]
            if time.monotonic() > deadline:
                missing = set(range(self.options.ranks)) - found.keys()
                raise AssertionError(
                    f"{self.name}: no record of request {request_id}, ranks {missing}, in {bound_s:g} s; "
                    f"status: {self.status()}"
                )
            time.sleep(0.02)

    @contextlib.contextmanager
    def recorded(self, bound_s: float = 30.0) -> Iterator[list[dict[str, Any]]]:
        """Yields a list. At the end of the block the list gets the record of the request that ended inside it."""
        seen = {record["req"] for record in self.records()}
        found: list[dict[str, Any]] = []
        yield found
        deadline = time.monotonic() + bound_s
        while not found:
            assert time.monotonic() < deadline, f"{self.name}: no new record in {bound_s:g} s; {self.status()}"
            found += [record for record in self.records() if record["req"] not in seen]
            time.sleep(0.02)

    def slots(self) -> tuple[int, int, int]:
        """Returns the numbers of free, held and quarantined slots, summed over all ranks."""
        free, held, quarantined = (
            sum(rank[kind] for rank in self.status()["ranks"]) for kind in ("free", "held", "quarantined")
        )
        return free, held, quarantined

    def wait_empty(self, bound_s: float = 60.0) -> None:
        """Returns when no slot is held or quarantined; raises after `bound_s`."""
        self._until(lambda: self.slots()[1:] == (0, 0), bound_s, "slots still held or quarantined")

    def _answers(self, path: str) -> bool:
        try:
            return call(f"{self.admin}{path}", timeout_s=2.0)[0] == 200
        except OSError:
            return False

    def _until(self, condition: Callable[[], bool], bound_s: float, what: str) -> None:
        assert self.process is not None
        deadline = time.monotonic() + bound_s
        while not condition():
            if not self.process.alive:
                raise self.process.failure(f"ended with exit code {self.process.exit_code}")
            if time.monotonic() > deadline:
                raise self.process.failure(f"{what} after {bound_s:g} s{self._hints()}")
            time.sleep(0.02)

    def _hints(self) -> str:
        """Returns the sidecar's readiness and status, for the text of a failure."""
        try:
            paths = ("/ready", "/status")
            return "".join(f"\n{path}: {call(self.admin + path, timeout_s=2.0)[1].strip()}" for path in paths)
        except OSError as error:
            return f"\n(no answer: {error})"

    def _yaml(self) -> str:
        """Returns the configuration file as JSON, which is also YAML."""
        options = self.options
        values: dict[str, object] = {
            "enable_pd": True,
            "pd_role": options.role,
            "pd_buffer_size": options.buffer_bytes,
            "pd_buffer_device": options.device,
            "chunk_size": CHUNK_TOKENS,
            "pre_caching_hash_algorithm": "sha256_cbor",
            **options.lmcache,
        }
        if options.role != "sender":
            values |= {
                "pd_peer_host": self.host,
                "pd_peer_init_port": self.init_ports,
                "pd_peer_alloc_port": self.alloc_ports,
            }
        if options.proxy is not None:
            host, _, port = options.proxy.rpartition(":")
            values |= {"pd_proxy_host": host, "pd_proxy_port": int(port)}
        ours: dict[str, object] = {
            "id": self.name,
            "socket": str(self.socket),
            "admin": self.admin.removeprefix("http://"),
        }
        if options.role != "sender":
            ours["tcp_port"] = self.tcp_port
        else:
            ours["ranks"] = options.ranks
        values["sidecar"] = {**ours, **options.keys}
        return json.dumps(values, indent=2) + "\n"

    def _env(self) -> dict[str, str]:
        # The sidecar looks for the NIXL library in the environment that VIRTUAL_ENV names.
        return {"VIRTUAL_ENV": sys.prefix, **self.options.env}
