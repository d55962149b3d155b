"""Starts the proxy and the sidecars of an overlay with their rendered commands, on ports that are free."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import yaml
from harness.client import call
from harness.drop_in.metadata_servers import ETCD
from harness.ports import free_port, free_ports
from harness.process import Process
from harness.sidecar import BINARIES, CHUNK_TOKENS, ROOT
from harness.waiting import until
from rendered import (
    POD_IP,
    Manifest,
    Pod,
    at_home,
    command,
    components,
    config_files,
    environment,
    mount,
    pod,
    port,
    secrets,
)

from pd_sidecar.client import Client
from pd_sidecar.sidecar.wire import Hello, Layout

BOUND_S = 60.0
LAYOUT = Layout("tiny", "bfloat16", 2, 2, 16, False, CHUNK_TOKENS)
# The URLs of mooncake.json have these ports. The other ports of the sidecars follow from them.
MOONCAKE = (13003, 13103)


class Parts:
    """The proxy and the sidecars of a folder, started with the rendered arguments, but with ports that are free."""

    def __init__(self, folder: str, tmp: Path, engine: str) -> None:
        self.folder, self.tmp, self.engine = folder, tmp, engine
        self.pods: dict[str, Pod] = {name: pod(folder, name) for name in components(folder)}
        self.processes: dict[str, Process] = {}
        self.clients: dict[str, Client] = {}
        self.mounts: dict[str, dict[str, Path]] = {}
        for name, text in config_files(folder).items():
            (tmp / name).write_text(text)
        first = free_ports((0, 49, 100, 109, 110, 149))
        self.ports = {MOONCAKE[0] + offset: first + offset for offset in (0, 49, 100, 109, 110, 149)}
        made = secrets(tmp)
        self.api_key, self.admin_key = (made["pd-proxy"][name].decode() for name in ("api", "admin"))
        for component, found in self.pods.items():
            self.mounts[component] = mount(found, self.container(component), made, tmp / "mounts" / component)

    def container(self, component: str) -> Manifest:
        return self.pods[component].container("proxy" if component == "proxy" else "sidecar")

    def free(self, number: int) -> int:
        """Returns the free port that takes the place of a port of the manifests."""
        return self.ports.setdefault(number, free_port())

    def start_metadata(self) -> None:
        """Starts etcd as the role `metadata` does."""
        if not ETCD.exists():
            subprocess.run([ROOT / "scripts" / "etcd.sh", ROOT / "target" / "etcd"], check=True, timeout=120)
        container = pod(self.folder, "metadata").container("etcd")
        program, *arguments = command(container)
        assert program == ETCD.name
        client, peer = f"127.0.0.1:{self.free(port(container, 'client'))}", f"http://127.0.0.1:{free_port()}"
        places = {"/data": str(self.tmp), "0.0.0.0:2379": client, "pd-metadata:2379": client}
        for inside, here in places.items():
            arguments = [argument.replace(inside, here) for argument in arguments]
        # The ports between several etcd, of which a pod needs none.
        arguments += [f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}"]
        arguments += [f"--initial-cluster=default={peer}"]
        process = self.processes["metadata"] = Process("etcd", [ETCD, *arguments], self.tmp / "etcd.log")
        probe = f"http://{client}{container['readinessProbe']['httpGet']['path']}"
        until("etcd does not answer", lambda: answers(probe, 200), process=process)

    def start(self, component: str) -> None:
        program, *arguments = command(self.container(component))
        env = {name: self.moved(component, value) for name, value in environment(self.container(component)).items()}
        if component == "proxy":
            arguments = [self._at_home(argument) for argument in arguments]
        else:
            env |= {
                "PD_SIDECAR_ID": f"pd-{component}-0",
                "PD_SIDECAR_ADVERTISE_HOST": "127.0.0.1",
                "PD_SIDECAR_ENGINE_URL": self.engine,
                "LMCACHE_PD_BUFFER_DEVICE": "cpu",
                "LMCACHE_PD_BUFFER_SIZE": str(16 * LAYOUT.chunk_bytes),
                "PD_SIDECAR_TRANSPORT": "tcp",
                "PD_SIDECAR_SOCKET": str(self.socket(component)),
            }
            (self.tmp / component).mkdir()
            # An emptyDir has this mode.
            (self.tmp / component).chmod(0o777)
            config, *others = arguments
            arguments = [f"--config={self._config(component, config.rpartition('/')[2])}", *others]
        self.processes[component] = Process(
            component, [BINARIES / program, *arguments], self.tmp / f"{component}.log", env
        )

    def connect(self, component: str) -> None:
        """Connects a client to the sidecar in the engine's place."""
        hello = Hello(v=1, engine=component, role=component, rank=0, world_size=1, layout=LAYOUT)
        self.clients[component] = Client.connect(str(self.socket(component)), hello, BOUND_S)

    def socket(self, component: str) -> Path:
        return self.tmp / component / "own" / "sidecar.sock"

    def probe(self, component: str, name: str) -> int | None:
        """Sends a probe as the manifest describes it. Returns the status; `None` if nothing listens."""
        get = self.container(component)[name]["httpGet"]
        number = self.free(port(self.container(component), get["port"]))
        try:
            return call(f"http://127.0.0.1:{number}{get['path']}", timeout_s=20.0)[0]
        except OSError:
            return None

    def until(self, component: str, probe: str, status: int) -> None:
        def answers() -> bool:
            for client in self.clients.values():
                client.poll()
            return self.probe(component, probe) == status

        until(f"{probe} does not answer {status}", answers, process=self.processes[component])

    def end(self, component: str) -> float:
        """Ends a process as a kubelet does. Returns the seconds that it took; fails if the exit code is not 0."""
        process, started = self.processes[component], time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.wait(self.pods[component].spec["terminationGracePeriodSeconds"]) == 0, process.tail()
        return time.monotonic() - started

    def close(self) -> None:
        for client in self.clients.values():
            client.close()
        for process in self.processes.values():
            process.kill()

    def _at_home(self, argument: str) -> str:
        flag, equals, value = argument.partition("=")
        if value.startswith(("0.0.0.0:", f"{POD_IP}:")):
            value = f"127.0.0.1:{self.free(int(value.rpartition(':')[2]))}"
        if flag == "--mooncake":
            value = str(self._config("proxy", value.rpartition("/")[2]))
        return flag + equals + self.moved("proxy", value)

    def moved(self, component: str, path: str) -> str:
        """Returns a path of a secret's file as it is on this host."""
        return at_home(path, self.mounts[component])

    def _config(self, component: str, name: str) -> Path:
        """Writes a configuration file with free ports."""
        text = config_files(self.folder)[name]
        file = self.tmp / f"{component}-{name}"
        if name.endswith(".json"):
            for number in MOONCAKE:
                text = text.replace(f"0.0.0.0:{number}", f"127.0.0.1:{self.free(number)}")
            file.write_text(text.replace("pd-metadata:2379", f"127.0.0.1:{self.free(2379)}"))
            return file
        values = yaml.safe_load(text)
        for key in ("pd_peer_init_port", "pd_peer_alloc_port", "pd_proxy_port"):
            if key in values:
                values[key] = self.free(values[key])
        if "pd_proxy_host" in values:
            values["pd_proxy_host"] = "127.0.0.1"
        ours = values["sidecar"]
        ours["admin"] = "0.0.0.0:" + str(self.free(int(ours["admin"].rpartition(":")[2])))
        for key in ("tcp_port", "fetch_port"):
            if key in ours:
                ours[key] = self.free(ours[key])
        for key in ("key_file", "roster"):
            ours[key] = self.moved(component, ours[key])
        file.write_text(json.dumps(values))
        return file


def answers(url: str, status: int) -> bool:
    try:
        return call(url, timeout_s=20.0)[0] == status
    except OSError:
        return False
