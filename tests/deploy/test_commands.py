"""Runs the commands of the rendered manifests with our own programs. No engine and no cluster is needed: a client takes
the place of each engine, and the test sends the probes and signals that a kubelet would send.
"""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from harness.client import call
from harness.ports import free_port
from harness.process import Process
from harness.scripted import JsonHandler, serving
from harness.sidecar import BINARIES, CHUNK_TOKENS
from harness.waiting import until
from rendered import (
    FOLDERS,
    Manifest,
    Pod,
    command,
    config_files,
    environment,
    manifests,
    mount,
    pod,
    port,
    secret_mounts,
    secrets,
    write_config,
)

from pd_sidecar.client import Client
from pd_sidecar.sidecar.wire import Granted, Hello, Layout, Ready, Target
from pd_sidecar.store.client import Bounds, StoreClient, address_of

BOUND_S = 60.0
# A process that has nothing to do ends sooner than its drain would end (10 s, or 30 s for the proxy).
IDLE_END_S = 9.0
LAYOUT = Layout("tiny", "bfloat16", 2, 2, 16, False, CHUNK_TOKENS)
ROLES = {"prefill": "producer", "decode": "consumer"}

# Reads a list of command lines, and prints what vLLM's own parser makes of each.
PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
parsed = [parser.parse_args(words) for words in json.load(sys.stdin)]
def connectors(config):
    several = config.kv_connector_extra_config.get("connectors")
    return several or [{"kv_role": config.kv_role, "kv_connector_module_path": config.kv_connector_module_path}]
print(json.dumps([(words.port, connectors(words.kv_transfer_config)) for words in parsed]))
"""

everywhere = pytest.mark.parametrize("folder", FOLDERS)
sides = pytest.mark.parametrize("component", ["prefill", "decode"])


@everywhere
@sides
def test_check_config(folder: str, component: str, tmp_path: Path) -> None:
    """The sidecar accepts its configuration with the environment of its container, and uses the pod's own address."""
    write_config(folder, tmp_path)
    found = pod(folder, component)
    container = found.container("sidecar")
    program, *arguments = command(container)
    assert program == "sidecar"
    (file,) = (word.removeprefix("--config=/etc/pd-sidecar/") for word in arguments)
    text = (tmp_path / file).read_text()
    for path, mounted in mount(found, container, secrets(tmp_path), tmp_path / "pod").items():
        assert path in text
        text = text.replace(path, str(mounted))
    (tmp_path / file).write_text(text)
    variables = environment(container, f"pd-{component}-0")
    done = subprocess.run(
        [BINARIES / "sidecar", "check-config", tmp_path / file, "--json"],
        env=variables,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    values = {entry["key"]: entry["value"] for entry in json.loads(done.stdout)["values"]}
    assert values["sidecar.advertise_host"] == variables["POD_IP"]
    assert values["sidecar.id"] == variables["PD_SIDECAR_ID"]
    assert (values["sidecar.auth"], values["sidecar.insecure"]) == ("require", "false")
    admin = values["sidecar.admin"].rpartition(":")[2]
    assert port(container, "admin") == int(admin)


def test_arguments_of_the_engines() -> None:
    """vLLM itself reads the arguments of each engine. The connector's module exists."""
    sides = [(folder, component) for folder in FOLDERS for component in ROLES]
    engines = [pod(folder, component).container("engine") for folder, component in sides]
    commands = [command(engine) for engine in engines]
    assert {tuple(words[:2]) for words in commands} == {("vllm", "serve")}
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps([words[2:] for words in commands]),
        capture_output=True,
        text=True,
        timeout=120.0,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parsed = json.loads(done.stdout.splitlines()[-1])
    for (folder, component), engine, (number, (ours, *others)) in zip(sides, engines, parsed, strict=True):
        assert number == port(engine, "http")
        assert ours["kv_role"] == f"kv_{ROLES[component]}"
        assert find_spec(ours["kv_connector_module_path"]) is not None
        for other in others:
            (tier,) = other["kv_connector_extra_config"]["secondary_tiers"]
            made = getattr(import_module(tier.pop("module_path")), tier.pop("type"))
            assert tier.keys() <= inspect.signature(made).parameters.keys()
            host, port_of_store = address_of(tier["url"])
            (service,) = (
                m["spec"] for m in manifests(folder) if m["metadata"]["name"] == host and m["kind"] == "Service"
            )
            assert [each["port"] for each in service["ports"]] == [port_of_store]


def answers(url: str, status: int) -> bool:
    try:
        return call(url, timeout_s=20.0)[0] == status
    except OSError:
        return False


def test_the_store_keeps_values(tmp_path: Path) -> None:
    """The store starts with the rendered arguments, answers its probes, and finds its values again after SIGTERM."""
    container = pod("overlays/store", "store").container("store")
    program, *arguments = command(container)
    (address, data), admin = (f"127.0.0.1:{free_port()}", memoryview(b"kv" * 500)), free_port()
    places = {
        "--listen": address,
        "--admin": f"127.0.0.1:{admin}",
        "--disk": str(tmp_path / "store"),
        "--disk-size": "1GiB",
    }
    flags = [f"{name}={places.get(name, value)}" for name, value in (argument.split("=", 1) for argument in arguments)]
    assert len(flags) == len(arguments) and set(places) <= {flag.split("=")[0] for flag in flags}
    client, got = StoreClient(f"lm://{address}", Bounds(timeout_s=BOUND_S)), bytearray(len(data))
    for start in range(2):
        process = Process("store", [BINARIES / program, *flags], tmp_path / "store.log")
        try:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                url = f"http://127.0.0.1:{admin}{container[probe]['httpGet']['path']}"
                until(f"{probe} does not answer 200", lambda: answers(url, 200), process=process)  # noqa: B023
            if start == 0:
                client.put([(b"key", data)])
            assert client.get([(b"key", memoryview(got))]) == [True]
            assert got == data
            process.signal(signal.SIGTERM)
            process.wait(BOUND_S)
        finally:
            process.kill()


class Parts:
    """The proxy and the sidecars of a folder, started with the rendered arguments, but with ports that are free."""

    def __init__(self, folder: str, tmp: Path, engine: str) -> None:
        self.folder, self.tmp, self.engine = folder, tmp, engine
        self.pods: dict[str, Pod] = {name: pod(folder, name) for name in ("proxy", *ROLES)}
        self.ports: dict[int, int] = {}
        self.processes: dict[str, Process] = {}
        self.clients: dict[str, Client] = {}
        self.mounts: dict[str, dict[str, Path]] = {}
        write_config(folder, tmp)
        made = secrets(tmp)
        self.api_key, self.admin_key = (made["pd-proxy"][name].decode() for name in ("api", "admin"))
        for component, found in self.pods.items():
            self.mounts[component] = mount(found, self.container(component), made, tmp / "mounts" / component)

    def container(self, component: str) -> Manifest:
        return self.pods[component].container("proxy" if component == "proxy" else "sidecar")

    def free(self, number: int) -> int:
        """Returns the free port that takes the place of a port of the manifests."""
        return self.ports.setdefault(number, free_port())

    def start(self, component: str) -> None:
        program, *arguments = command(self.container(component))
        env = environment(self.container(component))
        if component == "proxy":
            arguments = [self._at_home(argument) for argument in arguments]
        else:
            env |= {
                "PD_SIDECAR_ID": f"pd-{component}-0",
                "PD_SIDECAR_ADVERTISE_HOST": "127.0.0.1",
                "PD_SIDECAR_ENGINE_URL": self.engine,
                "LMCACHE_PD_BUFFER_DEVICE": "cpu",
                "PD_SIDECAR_TRANSPORT": "tcp",
            }
            arguments = [f"--config={self._config(component)}"]
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
        if value.startswith("0.0.0.0:"):
            value = f"127.0.0.1:{self.free(int(value.rpartition(':')[2]))}"
        return flag + equals + self.moved("proxy", value)

    def moved(self, component: str, path: str) -> str:
        """Returns a path of a secret's file as it is on this host."""
        for mounted, folder in self.mounts[component].items():
            path = path.replace(mounted, str(folder))
        return path

    def _config(self, component: str) -> Path:
        """Writes the sidecar's configuration with free ports, the socket in `tmp`, and small buffers."""
        name = f"{component}-sidecar.yaml"
        values = yaml.safe_load(config_files(self.folder)[name])
        for key in ("pd_peer_init_port", "pd_peer_alloc_port", "pd_proxy_port"):
            if key in values:
                values[key] = self.free(values[key])
        ours = values["sidecar"]
        ours["admin"] = "0.0.0.0:" + str(self.free(int(ours["admin"].rpartition(":")[2])))
        if "tcp_port" in ours:
            ours["tcp_port"] = self.free(ours["tcp_port"])
        (self.tmp / component).mkdir()
        # An emptyDir has this mode.
        (self.tmp / component).chmod(0o777)
        ours["socket"] = str(self.socket(component))
        for key in ("key_file", "roster"):
            ours[key] = self.moved(component, ours[key])
        values |= {"pd_proxy_host": "127.0.0.1", "pd_buffer_size": 16 * LAYOUT.chunk_bytes}
        file = self.tmp / name
        file.write_text(json.dumps(values))
        return file


class Healthy(JsonHandler):
    """Answers 200 to each `GET`, as `/health` of an engine does."""

    def do_GET(self) -> None:
        self.answer({})


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with serving(Healthy) as engine:
        parts = Parts("base", tmp_path, f"http://{engine}")
        try:
            yield parts
        finally:
            parts.close()


def test_a_pod_lives_and_ends(parts: Parts) -> None:
    """The probes answer as the manifests expect at each stage, in the order in which a cluster starts and ends pods."""
    parts.start("proxy")
    parts.until("proxy", "livenessProbe", 200)
    # The proxy is alive, but without a decode instance it is not ready.
    assert parts.probe("proxy", "readinessProbe") == 503
    for side in ROLES:
        parts.start(side)
        # The engine's container starts after this probe, so the probe must not need the engine.
        parts.until(side, "startupProbe", 200)
        assert parts.probe(side, "livenessProbe") == 200
        assert parts.probe(side, "readinessProbe") == 503
        assert parts.socket(side).parent.stat().st_mode & 0o777 == 0o700
    for side in ROLES:
        parts.connect(side)
        parts.until(side, "readinessProbe", 200)
    parts.until("proxy", "readinessProbe", 200)

    assert push(parts, CHUNK_TOKENS) == b"kv" * (LAYOUT.chunk_bytes // 2)
    models = f"http://127.0.0.1:{parts.free(8000)}/v1/models"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(models, timeout=BOUND_S)
    with_key = urllib.request.Request(models, headers={"authorization": f"Bearer {parts.api_key}"})
    assert urllib.request.urlopen(with_key, timeout=BOUND_S).status == 200

    # The preStop hook of the decode engine: from now on the proxy sends it no requests.
    leave(parts, "decode")
    parts.until("proxy", "readinessProbe", 503)
    for side in ROLES:
        parts.clients.pop(side).close()
        assert parts.end(side) < IDLE_END_S
    until("instances do not leave", lambda: not instances(parts), process=parts.processes["proxy"])
    # The hook of a pod that the proxy no longer knows must not fail.
    leave(parts, "decode")
    assert parts.end("proxy") < IDLE_END_S


def push(parts: Parts, tokens: int) -> bytes:
    """Pushes one chunk through the ports of the manifests. Returns the bytes that the decode side reads."""
    prefill, decode = parts.clients["prefill"], parts.clients["decode"]
    keys = ["tiny@1@0@1@bfloat16"]
    config = yaml.safe_load(config_files(parts.folder)["decode-sidecar.yaml"])
    init, alloc = (parts.free(config[f"pd_peer_{name}_port"]) for name in ("init", "alloc"))
    decode.await_("moves", keys, tokens=tokens, have_tokens=0, deadline_ms=30_000)
    prefill.reserve("moves", Target("127.0.0.1", init, alloc), keys, tokens=tokens, upto=tokens)
    read: list[bytes] = []

    def arrived() -> bool:
        for message in prefill.wait(0.02):
            if isinstance(message, Granted):
                for slot in message.slots:
                    prefill.slot(slot)[:] = b"kv" * (LAYOUT.chunk_bytes // 2)
                prefill.staged("moves", message.chunks)
        for message in decode.wait(0.02):
            if isinstance(message, Ready):
                read.extend(bytes(decode.slot(slot)) for slot in message.slots)
                decode.release("moves", message.chunks)
        return bool(read)

    until("no KV arrives", arrived, process=parts.processes["decode"])
    return read[0]


def leave(parts: Parts, component: str) -> None:
    """Runs the engine's preStop hook."""
    program, script = parts.pods[component].container("engine")["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "python3"
    engine = parts.pods[component].container("engine")
    key = Path(environment(engine)["PD_PROXY_ADMIN_KEY_FILE"])
    ((secret, items),) = (
        at for path, at in secret_mounts(parts.pods[component], engine).items() if path == str(key.parent)
    )
    assert (secret, items) == ("pd-proxy", [{"key": "admin", "path": key.name}])
    env = {
        "PD_SIDECAR_ID": f"pd-{component}-0",
        "PD_PROXY_URL": f"http://127.0.0.1:{parts.free(8000)}",
        "PD_PROXY_ADMIN_KEY_FILE": parts.moved("proxy", "/etc/pd-proxy/admin"),
    }
    file = parts.tmp / Path(script).name
    done = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True, timeout=BOUND_S, check=False)
    assert done.returncode == 0, done.stderr


def instances(parts: Parts) -> list[object]:
    headers = {"authorization": f"Bearer {parts.admin_key}"}
    request = urllib.request.Request(f"http://127.0.0.1:{parts.free(8000)}/instances", headers=headers)
    with urllib.request.urlopen(request, timeout=BOUND_S) as answer:
        found: list[object] = json.load(answer)
    return found
