"""Runs the commands of docs/quickstart-two-hosts.md on two hosts, word for word, and moves KV between them.

The hosts are two network namespaces of this host. They have the addresses of the page. No ssh server runs, so the test
copies what the page's `scp` would copy. No engine runs: a client at each sidecar takes the place of an engine.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness.process import Process
from harness.sidecar import BINARIES, NO_PUSH, ROOT, Sidecar, SidecarOptions
from harness.waiting import until
from test_groups import LAYOUT, Pair, hello
from test_two_hosts import ip

from pd_sidecar.client import Client

BUFFER_BYTES = 1 << 30
BOUND_S = 60.0

# Answers each GET with 200, as the health probe of an engine does.
ENGINE = """
import sys, threading
from harness.scripted import JsonHandler
from http.server import ThreadingHTTPServer
class Healthy(JsonHandler):
    def do_GET(self):
        self.answer({"data": []})
ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Healthy).serve_forever()
"""

pytestmark = pytest.mark.skipif(NO_PUSH, reason="nothing can be pushed")


class Host:
    """A host of the page: a network namespace, and a folder in the place of the user's home."""

    def __init__(self, name: str, folder: Path) -> None:
        self.within = ["ip", "netns", "exec", name]
        self.folder = folder
        folder.mkdir()
        self.env = {
            "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
            "XDG_RUNTIME_DIR": str(folder),
            "PYTHONPATH": str(ROOT / "tests"),
        }

    def command(self, line: str) -> list[str]:
        return [*self.within, "sh", "-c", f"cd {shlex.quote(str(self.folder))} && exec {line}"]

    def run(self, line: str) -> str:
        done = subprocess.run(
            self.command(line),
            env={**os.environ, **self.env},
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout

    def start(self, name: str, line: str) -> Process:
        return Process(name, self.command(line), self.folder.parent / f"{name}.log", self.env)


class Started(Sidecar):
    """A sidecar that a command of the page has started."""

    def __init__(self, role: str, host: Host, address: str, admin: int, process: Process) -> None:
        super().__init__(SidecarOptions(role, BUFFER_BYTES), host.folder, host.folder)
        self.at = host
        self.process = process
        self.host, self.init_ports, self.alloc_ports = address, [7300], [7400]
        self.admin = f"http://{address}:{admin}"
        self.socket = host.folder / "pd-sidecar" / f"{role}.sock"

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.at.run(f"curl -sf {self.admin}/status"))
        return status

    def _requests(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.at.run(f"curl -sf {self.admin}/requests"))
        return rows


def page_blocks() -> list[tuple[str, list[str]]]:
    """Returns the host of each block of the page, and the commands of the block."""
    page = (ROOT / "docs" / "quickstart-two-hosts.md").read_text()
    blocks = re.findall(r"```sh\n# on host ([AB])\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```sh\n")
    return [(host, text.replace("\\\n", " ").splitlines()) for host, text in blocks]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[dict[str, Host]]:
    names = {host: f"pd-{host}-{os.getpid()}" for host in "AB"}
    ends = {host: f"pd{host}{os.getpid()}" for host in "AB"}
    a, b = names["A"], names["B"]
    try:
        if not (
            ip("netns", "add", a)
            and ip("netns", "add", b)
            and ip("link", "add", ends["A"], "netns", a, "type", "veth", "peer", "name", ends["B"], "netns", b)
            and all(
                ip("-n", names[host], "addr", "add", f"{address}/24", "dev", ends[host])
                and ip("-n", names[host], "link", "set", ends[host], "up")
                and ip("-n", names[host], "link", "set", "lo", "up")
                for host, address in (("A", "10.0.0.1"), ("B", "10.0.0.2"))
            )
        ):
            pytest.skip("this user may not make network namespaces")
        yield {host: Host(name, tmp_path / host) for host, name in names.items()}
    finally:
        for name in names.values():
            ip("netns", "del", name)


def test_five_commands_make_an_authenticated_pair(hosts: dict[str, Host]) -> None:
    commands = [(host, line) for host, lines in page_blocks() for line in lines]
    checks = [command for command in commands if command[1].startswith("curl ")]
    commands = [command for command in commands if command not in checks]
    assert len(commands) <= 5
    started: dict[str, Process] = {}
    with ExitStack() as stack:
        for address, port, host in (("10.0.0.1", 8100, "A"), ("10.0.0.2", 8200, "B")):
            engine = f"{sys.executable} -c {shlex.quote(ENGINE)} {address} {port}"
            stack.callback(hosts[host].start(f"engine-{host}", engine).kill)
        for host, line in commands:
            words = line.split()
            if words[0] == "scp":
                *files, target = words[1:]
                assert target == "10.0.0.2:"
                for file in files:
                    shutil.copy2(hosts[host].folder / file, hosts["B"].folder)
            elif words[:2] == ["sidecar", "keygen"]:
                hosts[host].run(line)
            else:
                name = words[2] if words[0] == "sidecar" else words[0]
                started[name] = hosts[host].start(name, line)
                stack.callback(started[name].stop)
        assert started.keys() == {"pd-proxy", "sender", "receiver"}
        sender = Started("sender", hosts["A"], "10.0.0.1", 7910, started["sender"])
        receiver = Started("receiver", hosts["B"], "10.0.0.2", 7900, started["receiver"])
        for side in (sender, receiver):
            until(f"{side.name} does not listen", side.socket.exists)

        def page(path: str) -> Any:
            ((host, line),) = (check for check in checks if check[1].endswith(path))
            return json.loads(hosts[host].run(line))

        def states() -> dict[str, str]:
            return {instance["id"]: instance["standing"]["state"] for instance in page("/instances")}

        clients = [
            Client.connect(str(side.socket), hello(role, LAYOUT), BOUND_S)
            for side, role in ((sender, "prefill"), (receiver, "decode"))
        ]
        until("the instances are not ready", lambda: states() == {"prefill": "ready", "decode": "ready"})
        for client in clients:
            client.close()
        Pair(sender, receiver).move("r-0", tokens=1000, have=0, slots=BUFFER_BYTES // LAYOUT.chunk_bytes)
        record = receiver.records()[-1]
        assert record["req"] == "r-0" and record["bytes"] > 0

        channels = {channel["channel"]: channel["protection"] for channel in page("/status")["channels"]}
        assert "a key of the roster" in channels["registration"]
        for process in started.values():
            assert process.alive
            assert "INSECURE" not in process.output() and "--insecure" not in process.output()
