"""Tests `sidecar doctor`: it finds nothing on a healthy host, and names each fault that a test plants.

The faults are real: namespaces, limits, control groups, closed ports, wrong files. No engine runs: a client at each
sidecar takes the place of an engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.ports import free_port
from harness.process import Process
from harness.proxy import Proxy
from harness.scripted import JsonHandler, serving
from harness.sidecar import BINARIES, Sidecar, SidecarOptions
from harness.waiting import until
from test_groups import LAYOUT, hello
from test_keys import Fleet
from test_two_hosts import OUR_END, end, other_host

from pd_sidecar.client import Client

BUFFER = 16 * LAYOUT.chunk_bytes
BOUND_S = 60.0

# The longest run: two measurements, each with the start of its libraries.
RUN_BOUND_S = 400.0


@dataclass
class Report:
    """The doctor's report."""

    code: int
    json: dict[str, Any]

    @property
    def codes(self) -> list[str]:
        return sorted({finding["code"] for finding in self.json["findings"]})

    def seen(self, code: str) -> str:
        """Returns the observation of a finding, and checks that the report has it, with a reason and a cure."""
        for finding in self.json["findings"]:
            if finding["code"] == code:
                assert finding["why"] and finding["cure"]
                assert self.code == max({"warning": 1, "error": 2}[f["severity"]] for f in self.json["findings"])
                return str(finding["seen"])
        raise AssertionError(f"no finding {code}: {self.json['findings']}")


def doctor(
    *words: str | Path, env: dict[str, str] | None = None, within: list[str] | None = None, seconds: int = 0
) -> Report:
    """Runs the doctor; `within` is a command that runs it."""
    command = [*(within or []), BINARIES / "sidecar", "doctor", "--json", "--quiet", "--seconds", str(seconds), *words]
    # On a busy machine a healthy wire can be slow.
    command += ["--ignore", "wire-slow", "--ignore", "pair-slow"]
    full = {"VIRTUAL_ENV": sys.prefix, "PATH": os.environ["PATH"], **(env or {})}
    done = subprocess.run(command, env=full, capture_output=True, text=True, timeout=RUN_BOUND_S, check=False)
    assert done.returncode in (0, 1, 2), f"{command}\n{done.stdout}\n{done.stderr}"
    return Report(done.returncode, json.loads(done.stdout))


class Healthy(JsonHandler):
    """An engine's HTTP server."""

    def do_GET(self) -> None:
        self.answer({})


@dataclass
class Running:
    """A proxy and two sidecars with engines, all of them healthy."""

    proxy: Proxy
    sender: Sidecar
    receiver: Sidecar
    engine: str

    def options(self, role: str, **changes: Any) -> SidecarOptions:
        known: dict[str, Any] = {"proxy": self.proxy.registration, "engine_url": self.engine, "buffer_bytes": BUFFER}
        return SidecarOptions(role, **(known | changes))

    def config(self, folder: Path, role: str = "receiver", **changes: Any) -> Path:
        """Writes the configuration of a sidecar that does not run, and returns its path."""
        changes = {"keys": {"proxy": self.proxy.registration, "engine_url": self.engine}} | changes
        return Sidecar(self.options(role, **changes), folder, folder, name=f"idle-{role}").configure()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("doctor")
    proxy = Proxy(folder)
    with serving(Healthy) as engine, contextlib.ExitStack() as stack:
        pair = Running(proxy, None, None, f"http://{engine}")  # type: ignore[arg-type]
        pair.sender, pair.receiver = (Sidecar(pair.options(role), folder, folder) for role in ("sender", "receiver"))
        for part in (proxy, pair.sender, pair.receiver):
            part.start()
            stack.callback(part.stop)
        for side, role in ((pair.sender, "prefill"), (pair.receiver, "decode")):
            stack.callback(Client.connect(str(side.socket), hello(role, LAYOUT), BOUND_S).close)
        proxy.wait_ready()
        yield pair


def everything(pair: Running) -> list[str]:
    return [word for url in (pair.sender.admin, pair.receiver.admin, pair.proxy.url) for word in ("--at", url)]


def test_a_healthy_host_with_a_healthy_pair(running: Running, tmp_path: Path) -> None:
    """Nothing is found before the first start and while everything runs, and each wire of the host is measured."""
    for role in ("sender", "receiver"):
        before = doctor(running.config(tmp_path, role))
        assert (before.code, before.codes) == (0, []), before.json
    peer = f"127.0.0.1:{running.receiver.init_port}"
    found = doctor(running.receiver.configure(), *everything(running), "--peer", peer, seconds=1)
    assert (found.code, found.codes) == (0, []), found.json
    measured = {rate["transport"]: rate for rate in found.json["measured"]}
    assert measured.keys() == {"nixl", "tcp"}
    assert all(rate["gb_per_s"] > 0 for rate in measured.values())
    # UCX's own log says what it took within this host.
    assert "memory" in measured["nixl"]["route"], measured
    facts = " ".join(fact["text"] for fact in found.json["facts"])
    assert "a sender here would take nixl" in facts
    assert "UCX 1." in facts


def test_the_text_and_the_help_name_codes_cures_and_exit_codes(running: Running, tmp_path: Path) -> None:
    config = running.config(tmp_path, lmcache={"pd_peer_hosts": "x"})
    command: list[str | Path] = [BINARIES / "sidecar", "doctor", config, "--seconds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_BOUND_S, check=False)
    assert done.returncode == 2
    assert "error: config-wrong" in done.stdout and "  cure  " in done.stdout
    ignored = subprocess.run([*command, "--ignore", "config-wrong"], capture_output=True, text=True, check=False)
    assert "nothing found (1 ignored)" in ignored.stdout or "1 ignored" in ignored.stdout
    wrong = subprocess.run([*command, "--ignore", "no-such-code"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 64 and "docs/doctor.md" in wrong.stderr
    shown = subprocess.run([BINARIES / "sidecar", "doctor", "--help"], capture_output=True, text=True, check=True)
    assert "Exit codes" in shown.stdout and "--peer decode-host:7300" in shown.stdout


def test_mistakes_of_the_configuration(running: Running, tmp_path: Path) -> None:
    wrong = doctor(running.config(tmp_path, lmcache={"pd_buffer_size": "4G"}))
    assert "pd_buffer_size" in wrong.seen("config-wrong")
    unknown = doctor(running.config(tmp_path, lmcache={"futuristic": 1}))
    assert "futuristic" in unknown.seen("config-unknown-key")
    alone = doctor(running.config(tmp_path, proxy=None, keys={}))
    assert "no proxy is configured" in alone.seen("config-doubtful")
    assert alone.code == 1


def test_keys_and_rosters(running: Running, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o700)
    fleet = Fleet(folder)
    own, front = fleet.key("receiver"), fleet.key("front")
    fleet.write({own: ("receiver", "receiver"), front: ("front", "proxy")})

    def run(auth: str = "require", *words: str) -> Report:
        keys = {key: value for key, value in fleet.settings("receiver", auth).items() if key != "checksum"}
        options = running.options("receiver", keys={**keys, "id": "receiver", "proxy": running.proxy.registration})
        config = Sidecar(options, tmp_path, tmp_path, name="receiver").configure()
        return doctor(config, *words)

    assert "no sender" in run().seen("roster-lacks-role")
    sender = fleet.key("sender")
    members = {own: ("receiver", "receiver"), front: ("front", "proxy"), sender: ("sender", "sender")}
    fleet.write(members)
    assert run().codes == []
    assert "prefer" in run("prefer").seen("auth-prefer")

    roster = folder / "roster.yaml"
    entries = json.loads(roster.read_text())
    entries[own]["hosts"] = ["10.0.0.1"]
    roster.write_text(json.dumps(entries))
    away = run("require", "--peer", f"127.0.0.1:{running.receiver.init_port}")
    assert "127.0.0.1" in away.seen("roster-lacks-host")
    # The receiver of the healthy pair has no key, so the handshake with it fails, too.
    assert "peer-no-answer" in away.codes

    fleet.write({**members, fleet.key("next"): ("sender", "sender")})
    assert run().codes == []
    two_days_ago = time.time() - 2 * 86_400
    os.utime(roster, (two_days_ago, two_days_ago))
    assert "sender has two keys" in run().seen("rotation-unfinished")

    fleet.write(members)
    roster.chmod(0o666)
    assert "0666" in run().seen("roster-writable")
    roster.write_text("ed25519:nonsense: {name: x, roles: [sender]}\n")
    assert "ed25519:nonsense" in run().seen("roster")
    fleet.write(members)
    (folder / "receiver.key").chmod(0o644)
    assert "0644" in run().seen("key-file")


def test_the_socket_and_its_folder(running: Running, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir(mode=0o700)
    path = folder / "x.sock"

    def run() -> Report:
        keys = {"socket": str(path), "proxy": running.proxy.registration, "engine_url": running.engine}
        options = running.options("receiver", keys=keys)
        return doctor(Sidecar(options, tmp_path, tmp_path, name="socket").configure())

    assert run().codes == []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert str(path) in run().seen("socket-served")
    folder.chmod(0o777)
    assert "mode 0777" in run().seen("socket-folder")


def test_ports_and_addresses(running: Running, tmp_path: Path) -> None:
    side = Sidecar(running.options("receiver"), tmp_path, tmp_path, name="ports")
    config = side.configure()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", side.alloc_port))
        listener.listen()
        assert f"process {os.getpid()}" in doctor(config).seen("port-taken")
    side.init_ports = [40_001]
    assert "40001" in doctor(side.configure()).seen("port-ephemeral")
    side.init_ports = [83]
    weak = ["setpriv", "--bounding-set", "-net_bind_service"]
    assert ":83" in doctor(side.configure(), within=weak).seen("port-forbidden")
    side.init_ports, side.host = [free_port()], "192.0.2.7"
    assert "192.0.2.7" in doctor(side.configure(), "--insecure").seen("address-absent")


def test_memory_and_limits(running: Running, tmp_path: Path) -> None:
    config = running.config(tmp_path)
    large = doctor(running.config(tmp_path, buffer_bytes=10**15))
    assert "TiB" in large.seen("memory")
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"', "sh"]
    assert "/dev/shm" in doctor(config, within=small).seen("shared-memory")
    assert "1024" in doctor(config, within=["prlimit", "--nofile=1024:1024"]).seen("open-files")
    assert "1 processor" in doctor(config, within=["taskset", "--cpu-list", "0"]).seen("cpu-few")


def test_a_quota_of_the_control_group(running: Running, tmp_path: Path) -> None:
    """Runs the doctor in a control group with half a processor, in either version of control groups."""
    name = f"pd-doctor-{os.getpid()}"
    root = Path("/sys/fs/cgroup")
    v2 = (root / "cgroup.controllers").exists()
    group = (root if v2 else root / "cpu") / name
    try:
        group.mkdir()
        if v2:
            (group / "cpu.max").write_text("50000 100000")
        else:
            (group / "cpu.cfs_quota_us").write_text("50000")
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"this user may not make control groups with a quota: {error}")
    try:
        enter = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        assert "0.50 processors" in doctor(running.config(tmp_path), within=enter).seen("cpu-few")
    finally:
        group.rmdir()


def rdma(state: str, *, files: bool) -> list[str]:
    """Returns a command that runs another one on a host with an RDMA device, which is made of files."""
    device = "/sys/class/infiniband/mlx5_0/ports/1"
    make = f"mount -t tmpfs none /sys/class && mkdir -p {device} && echo '{state}' > {device}/state"
    if files:
        make += " && mount -t tmpfs none /dev/mqueue && mkdir -p /dev/infiniband && : > /dev/infiniband/uverbs0"
    return ["unshare", "--mount", "sh", "-c", f'{make} && exec "$@"', "sh"]


def test_rdma_devices(running: Running, tmp_path: Path) -> None:
    config = running.config(tmp_path)
    weak = ["setpriv", "--bounding-set", "-ipc_lock", "prlimit", "--memlock=65536"]
    found = doctor(config, "--buffer-size", "1GiB", within=[*rdma("4: ACTIVE", files=False), *weak])
    assert "64.00 KiB" in found.seen("locked-memory")
    assert "uverbs" in found.seen("rdma-device-file")
    assert "mlx5_0:1" in doctor(config, within=rdma("1: DOWN", files=False)).seen("rdma-port-down")
    # The built-in transport needs no device.
    tcp = running.config(tmp_path, transport="tcp", keys={"proxy": running.proxy.registration, "transport": "tcp"})
    assert doctor(tcp, within=[*rdma("1: DOWN", files=False), *weak]).codes == []


def test_libraries_gpus_and_the_settings_of_ucx(running: Running, tmp_path: Path) -> None:
    config = running.config(tmp_path)
    without = {"VIRTUAL_ENV": "/nowhere"}
    nowhere = ["env", "PATH=/nowhere"]
    assert "/nowhere" in doctor(config, env=without, within=nowhere).seen("library-missing")
    required = doctor(config, "--transport", "nixl", env=without, within=nowhere)
    assert "/nowhere" in required.seen("library-required")
    assert "cuda_icp" in doctor(config, env={"UCX_TLS": "sm,cuda_icp"}).seen("ucx-tls-unknown")
    assert "mlx5_9:1" in doctor(config, env={"UCX_NET_DEVICES": "mlx5_9:1"}).seen("ucx-device-unknown")
    gpu = doctor(config, "--buffer-device", "cuda:99", env={"UCX_TLS": "sm,self"})
    assert {"gpu-unavailable", "gpu-missing"} & set(gpu.codes)
    assert "sm,self" in gpu.seen("ucx-tls-without-cuda")


def test_the_proxys_port(running: Running, tmp_path: Path) -> None:
    clients = running.proxy.url.removeprefix("http://")
    config = running.config(tmp_path, keys={"engine_url": running.engine})
    assert clients in doctor(config, "--proxy", clients).seen("proxy-wrong-port")
    closed = f"127.0.0.1:{free_port()}"
    assert closed in doctor(config, "--proxy", closed).seen("proxy-unreachable")


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """Yields a port that drops the packets of new connections, as a firewall does: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_peers(running: Running, tmp_path: Path) -> None:
    config = running.config(tmp_path, "sender")

    def peer(at: str, *words: str) -> Report:
        return doctor(config, *words, "--peer", at)

    closed = f"127.0.0.1:{free_port()}"
    assert closed in peer(closed).seen("peer-refused")
    with silent() as port:
        assert str(port) in peer(f"127.0.0.1:{port}").seen("peer-silent")
    assert "nowhere.invalid" in peer("nowhere.invalid:7300").seen("peer-unknown")
    clients = running.proxy.url.removeprefix("http://")
    assert clients in peer(clients).seen("peer-no-answer")
    only_tcp = Sidecar(running.options("receiver", transport="tcp"), tmp_path, tmp_path, name="only-tcp")
    try:
        only_tcp.start()
        at = f"127.0.0.1:{only_tcp.init_port}"
        assert "transport nixl is configured" in peer(at, "--transport", "nixl").seen("no-common-wire")
        assert peer(at).codes == []
    finally:
        only_tcp.stop()


class Old(JsonHandler):
    """A sidecar of another release on a host with another clock."""

    def do_GET(self) -> None:
        page = {"id": "old", "role": "sender", "version": "0.0.1", "reasons": [], "ranks": [], "links": []}
        self.answer({**page, "proxy": None})

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(time.time() - 3600)


def test_running_programs(running: Running, tmp_path: Path) -> None:
    closed = f"http://127.0.0.1:{free_port()}"
    assert closed in doctor("--at", closed).seen("not-running")
    lonely = Sidecar(
        running.options("receiver", proxy=closed.removeprefix("http://")), tmp_path, tmp_path, name="lonely"
    )
    empty = Proxy(tmp_path)
    try:
        lonely.start()
        empty.start()
        found = doctor("--at", lonely.admin, "--at", empty.url)
        assert "no engine is connected" in found.seen("not-ready")
        assert "never called back" in found.seen("not-registered")
        assert "knows no prefill instance" in found.seen("role-missing")
        lonely.options.proxy = empty.registration
        lonely.restart()
        until("the sidecar does not register", lambda: len(empty.instances()) == 1)
        assert "lonely" in doctor("--at", empty.url).seen("instance-not-ready")
    finally:
        lonely.stop()
        empty.stop()
    with serving(Old) as old:
        found = doctor("--at", running.sender.admin, "--at", f"http://{old}")
    assert "0.0.1" in found.seen("releases-differ")
    assert old in found.seen("clock-skew")


def test_namespaces_and_users(running: Running, tmp_path: Path) -> None:
    apart = Sidecar(running.options("sender", within=["unshare", "--ipc"]), tmp_path, tmp_path, name="apart")
    try:
        apart.start()
        found = doctor("--at", running.receiver.admin, "--at", apart.admin)
        assert "different ipc namespaces" in found.seen("namespaces-differ")
    finally:
        apart.stop()
    port = free_port()
    # The interpreter of a virtual environment may lie in a folder that other users cannot enter.
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    command = ["setpriv", "--reuid", "65534", "--clear-groups", python, "-m", "http.server", str(port)]
    engine = Process("engine", [*command, "--bind", "127.0.0.1", "--directory", "/"], tmp_path / "engine.log")
    url = f"http://127.0.0.1:{port}"
    config = running.config(tmp_path, keys={"proxy": running.proxy.registration}, engine_url=url)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        until("the server does not listen", listens)
        assert "user 65534" in doctor(config, "--engine-url", url).seen("users-differ")
    finally:
        engine.kill()


def test_measurements(running: Running, tmp_path: Path) -> None:
    config = running.config(tmp_path)
    # UCX has no transport between two processes, because this host has no RDMA device.
    broken = doctor(config, "--transport", "nixl", env={"UCX_TLS": "rc,self"}, seconds=1)
    assert "nixl" in broken.seen("wire-fails")
    odd = doctor(config, "--transport", "nixl", env={"UCX_NOT_A_SETTING": "1"}, seconds=1)
    assert "UCX_NOT_A_SETTING" in odd.seen("ucx-variable-unknown")
    assert odd.codes == ["ucx-variable-unknown"]


def test_the_rate_between_two_hosts(tmp_path: Path) -> None:
    """Pushes bytes between two sidecars on two hosts, whose engines have not started."""
    with other_host() as within:
        receiver = Sidecar(
            SidecarOptions("receiver", 64 << 20, transport="tcp", flags=["--insecure"]), tmp_path, tmp_path
        )
        receiver.host = OUR_END
        sender = Sidecar(SidecarOptions("sender", 64 << 20, transport="tcp", within=within), tmp_path, tmp_path)
        try:
            receiver.start()
            # No process of this host reaches the sender's admin server, so `start` would wait in vain.
            sender.configure()
            sender.process = Process(
                "sender", [*within, BINARIES / "sidecar", *sender.arguments()], tmp_path / "sender.log"
            )
            until("the sender has no socket", sender.socket.exists)
            target = f"{OUR_END}:{receiver.init_port}:{receiver.alloc_port}"
            flags: list[str | Path] = ["--insecure"]
            lost = doctor(sender.configure(), "--push", f"{OUR_END}:1:1", within=within[:4], seconds=1)
            assert "no_link" in lost.seen("pair-moves-nothing")
            # The side that pushes comes first: it waits for the other side.
            pushing = ThreadPoolExecutor(1).submit(
                doctor, sender.configure(), "--push", target, within=within[:4], seconds=1
            )
            log = tmp_path / "sender.log"
            until("no request was refused", lambda: "reason=no_engine" in log.read_text())
            arrived = doctor(receiver.configure(), "--answer", *flags)
            found = pushing.result(RUN_BOUND_S)
            assert "pair-moves-nothing" not in found.codes, found.json
            (rate,) = found.json["measured"]
            assert rate["transport"] == "tcp" and rate["gb_per_s"] > 0
            (fact,) = (fact["text"] for fact in arrived.json["facts"] if fact["area"] == "pair")
            requests, size = int(fact.split()[0]), int(fact.split()[3])
            assert requests >= 1 and size == requests * (8 << 20)
            receiver.wait_empty()
            nobody = doctor(receiver.configure(), "--push", target, "--socket", str(tmp_path / "none.sock"), *flags)
            assert "none.sock" in nobody.seen("pair-no-sidecar")
        finally:
            end(sender)
            receiver.stop()
