"""Tests that a sidecar opens only the ports that its configuration names, and that it reports each of them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from harness.listening import listening
from harness.process import Process
from harness.sidecar import BINARIES, NO_PUSH, Sidecar, SidecarOptions
from test_strangers import BOUND_S, LAYOUT, Sides, hello
from test_two_hosts import ITS_END, OUR_END, end, other_host

from pd_sidecar.client import Client

# With these variables a sidecar finds no NIXL: neither in a virtual environment nor next to a python3 of PATH.
NO_NIXL = {"VIRTUAL_ENV": "/nowhere", "PATH": "/nowhere"}

# Connects to every given port from the host on which it runs, and prints the ports that accept a connection.
TRY = """
import json, socket, sys
open_ports = []
for port in json.loads(sys.argv[2]):
    with socket.socket() as stream:
        stream.settimeout(2)
        if stream.connect_ex((sys.argv[1], port)) == 0:
            open_ports.append(port)
print(json.dumps(open_ports))
"""


@contextmanager
def running(folder: Path, role: str, **options: object) -> Iterator[Sidecar]:
    sidecar = Sidecar(SidecarOptions(role, 4 * LAYOUT.chunk_bytes, **options), folder, folder)  # type: ignore[arg-type]
    try:
        sidecar.start()
        yield sidecar
    finally:
        sidecar.stop()


def configured(sidecar: Sidecar) -> set[str]:
    """Returns the sockets that the configuration file names."""
    named = {f"tcp {urlsplit(sidecar.admin).netloc}", f"unix {sidecar.socket}"}
    if sidecar.options.role != "sender":
        ports = [sidecar.init_port, sidecar.alloc_port]
        if sidecar.options.transport != "nixl":
            ports.append(sidecar.tcp_port)
        named |= {f"tcp {sidecar.host}:{port}" for port in ports}
    return named


@pytest.mark.parametrize("present", [True, False], ids=["nixl present", "no nixl"])
@pytest.mark.parametrize("transport", ["auto", "nixl", "tcp"])
@pytest.mark.parametrize("role", ["sender", "receiver", "both"])
def test_it_listens_where_the_configuration_says_and_shows_it(
    tmp_path: Path, role: str, transport: str, present: bool
) -> None:
    if transport == "nixl" and not present:
        pytest.skip("it does not start")
    with running(tmp_path, role, transport=transport, env={} if present else NO_NIXL) as sidecar:
        found = listening(sidecar.pid)
        assert found == configured(sidecar)
        shown = sidecar.status()["listens"]
        assert {socket["address"] for socket in shown} == found
        assert all(socket["channel"] for socket in shown)
        log = (tmp_path / f"{sidecar.name}.log").read_text()
        assert all(f'address="{address}"' in log for address in found)
        assert ("no NIXL" in log) == (transport == "auto" and not present)


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_stranger_on_another_host_finds_no_port(tmp_path: Path, role: str) -> None:
    with other_host() as within, running(tmp_path, role) as sidecar:
        ports = sorted({int(at.rpartition(":")[2]) for at in listening(sidecar.pid) if at.startswith("tcp ")})
        tried = subprocess.run(
            [*within, "python3", "-c", TRY, OUR_END, json.dumps(ports)], capture_output=True, check=True, text=True
        )
        assert json.loads(tried.stdout) == []
        assert len(ports) == (1 if role == "sender" else 4)
        assert sidecar.running


@pytest.mark.skipif(NO_PUSH, reason="nothing can be pushed")
def test_two_sidecars_of_one_host_take_nixl_without_a_port(tmp_path: Path) -> None:
    with running(tmp_path, "receiver") as receiver, running(tmp_path, "sender") as sender:
        decode = Client.connect(str(receiver.socket), hello("decode"), BOUND_S)
        prefill = Client.connect(str(sender.socket), hello("prefill"), BOUND_S)
        Sides(sender, receiver, prefill, decode).check()
        (link,) = sender.status()["links"]
        assert link["transport"] == "nixl", link
        for sidecar in (receiver, sender):
            assert listening(sidecar.pid) == configured(sidecar)


@pytest.mark.skipif(NO_PUSH, reason="nothing can be pushed")
def test_two_hosts_take_the_built_in_wire(tmp_path: Path) -> None:
    with other_host() as within:
        options = SidecarOptions("receiver", 4 * LAYOUT.chunk_bytes, flags=["--insecure"])
        receiver = Sidecar(options, tmp_path, tmp_path)
        receiver.host = OUR_END
        sender = Sidecar(replace(options, role="sender", within=within), tmp_path, tmp_path)
        sender.admin = f"http://{ITS_END}:{urlsplit(sender.admin).port}"
        try:
            receiver.start()
            sender.start()
            decode = Client.connect(str(receiver.socket), hello("decode"), BOUND_S)
            prefill = Client.connect(str(sender.socket), hello("prefill"), BOUND_S)
            Sides(sender, receiver, prefill, decode).check()
            (link,) = sender.status()["links"]
            assert link["transport"] == "tcp", link
            assert "sidecar.nixl_over_tcp: trusted" in link["why"]
            assert listening(receiver.pid) == configured(receiver)
        finally:
            end(sender)
            receiver.stop()


@pytest.mark.parametrize("tls", ["tcp", "all", "self,tcp,cuda"])
def test_ucx_gets_tcp_by_consent_only(tmp_path: Path, tls: str) -> None:
    sidecar = Sidecar(SidecarOptions("receiver", 4 * LAYOUT.chunk_bytes), tmp_path, tmp_path)
    command: list[str | Path] = [BINARIES / "sidecar", "--config", sidecar.configure()]
    process = Process("refused", command, tmp_path / "refused.log", {"UCX_TLS": tls})
    assert process.wait(60.0) == 64
    text = (tmp_path / "refused.log").read_text()
    assert "environment UCX_TLS" in text and "sidecar.nixl_over_tcp: trusted" in text
    consent: dict[str, object] = {"nixl_over_tcp": "trusted"}
    with running(tmp_path, "receiver", env={"UCX_TLS": tls}, keys=consent) as sidecar:
        ucx = listening(sidecar.pid) - configured(sidecar)
        assert len(ucx) == 1, ucx
        assert ucx.pop().startswith("tcp 127.0.0.1:"), "the configured host only"
        assert {s["address"] for s in sidecar.status()["listens"]} == listening(sidecar.pid)


def test_with_consent_ucx_listens_at_the_configured_host_only(tmp_path: Path) -> None:
    with other_host():
        consent: dict[str, object] = {"nixl_over_tcp": "trusted"}
        options = SidecarOptions("receiver", 4 * LAYOUT.chunk_bytes, keys=consent, flags=["--insecure"])
        sidecar = Sidecar(options, tmp_path, tmp_path)
        sidecar.host = OUR_END
        try:
            sidecar.start()
            (ucx,) = listening(sidecar.pid) - configured(sidecar)
            assert ucx.startswith(f"tcp {OUR_END}:")
            assert f"pda{os.getpid()}" in (tmp_path / f"{sidecar.name}.log").read_text()
        finally:
            sidecar.stop()
