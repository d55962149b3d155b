"""Runs the commands of the rendered manifests with our own programs. No engine and no cluster is needed: a client takes
the place of each engine, and the test sends the probes and signals that a kubelet would send.
"""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness.ports import free_port
from harness.process import Process
from harness.scripted import JsonHandler, serving
from harness.sidecar import BINARIES, CHUNK_TOKENS
from harness.waiting import until
from parts import BOUND_S, LAYOUT, Parts, answers
from rendered import (
    FOLDERS,
    checked,
    command,
    environment,
    manifests,
    pod,
    port,
    secret_mounts,
    settings,
)

from pd_sidecar.sidecar.wire import Granted, Ready, Target
from pd_sidecar.store.client import Bounds, StoreClient, address_of

# A process that has nothing to do ends sooner than its drain would end (10 s, or 30 s for the proxy).
IDLE_END_S = 9.0
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
def test_check_config(folder: str, component: str) -> None:
    """The sidecar accepts its configuration with the environment of its container, and uses the pod's own address. Its
    channels have the ports of the container.
    """
    container = pod(folder, component).container("sidecar")
    variables = environment(container, f"pd-{component}-0")
    values = settings(folder, component)
    assert values["sidecar.advertise_host"] == variables["POD_IP"]
    assert values["sidecar.id"] == variables["PD_SIDECAR_ID"]
    assert (values["sidecar.auth"], values["sidecar.insecure"]) == ("require", "false")
    ports = {each["name"]: str(each["containerPort"]) for each in container["ports"]}
    channels = {each["channel"]: each["address"].rpartition(":")[2] for each in checked(folder, component)["channels"]}
    ours = {name: number for name, number in channels.items() if name not in ("local", "registration")}
    # With CUDA IPC alone no sidecar listens for data.
    assert ours.items() <= ports.items() and ports.keys() - ours.keys() <= {"data"}


def test_arguments_of_the_engines() -> None:
    """vLLM itself reads the arguments of each engine. The connector's module exists."""
    sides = [(folder, component) for folder in FOLDERS for component in ROLES]
    engines = [pod(folder, component).container("engine") for folder, component in sides]
    commands = [command(engine) for engine in engines]
    # A worker of Dynamo takes the flags of vLLM, and flags of its own.
    starts = {("vllm", "serve"): 2, ("python3", "-m", "dynamo.vllm"): 3}
    for number, words in enumerate(commands):
        (skipped,) = (count for start, count in starts.items() if tuple(words[:count]) == start)
        commands[number] = [word for word in words[skipped:] if not word.startswith("--disaggregation-mode=")]
    # Most overlays have the arguments of the base.
    unique = list(dict.fromkeys(map(tuple, commands)))
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(unique),
        capture_output=True,
        text=True,
        timeout=300.0,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parsed = dict(zip(unique, json.loads(done.stdout.splitlines()[-1]), strict=True))
    for (folder, component), engine, words in zip(sides, engines, commands, strict=True):
        number, (ours, *others) = parsed[tuple(words)]
        assert number == port(engine, "http") or engine["command"][0] != "vllm"
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


class Healthy(JsonHandler):
    """Answers 200 to each `GET`, as `/health` of an engine does."""

    def do_GET(self) -> None:
        self.answer({})


@pytest.fixture
def parts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Parts]:
    with serving(Healthy) as engine:
        parts = Parts(request.param, tmp_path, f"http://{engine}")
        try:
            yield parts
        finally:
            parts.close()


@pytest.mark.parametrize("parts", ["base", "overlays/mooncake"], indirect=True)
def test_a_pod_lives_and_ends(parts: Parts) -> None:
    """The probes answer as the manifests expect at each stage, in the order in which a cluster starts and ends pods."""
    if parts.folder == "overlays/mooncake":
        parts.start_metadata()
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
    init, alloc = (parts.free(port(parts.container("decode"), name)) for name in ("init", "alloc"))
    decode.await_("moves", keys, tokens=tokens, have_tokens=0, deadline_ms=30_000)
    prefill.reserve("moves", Target("127.0.0.1", init, alloc), keys, tokens=tokens, upto=tokens)
    return moved(parts, "moves", "moves")


def moved(parts: Parts, sent: str, wanted: str) -> bytes:
    """Plays both engines. Returns the bytes of the first chunk that the decode side reads."""
    prefill, decode = parts.clients["prefill"], parts.clients["decode"]
    read: list[bytes] = []

    def arrived() -> bool:
        for message in prefill.wait(0.02):
            if isinstance(message, Granted):
                for slot in message.slots:
                    prefill.slot(slot)[:] = b"kv" * (LAYOUT.chunk_bytes // 2)
                prefill.staged(sent, message.chunks)
        for message in decode.wait(0.02):
            if isinstance(message, Ready):
                read.extend(bytes(decode.slot(slot)) for slot in message.slots)
                decode.release(wanted, message.chunks)
        return bool(read)

    until("no KV arrives", arrived, process=parts.processes["decode"])
    return read[0]


@pytest.mark.parametrize("parts", ["overlays/llm-d"], indirect=True)
def test_pods_of_another_router(parts: Parts) -> None:
    """Without pd-proxy the sidecars are ready as soon as their engines are connected. The decode side fetches the KV of
    a leg that names no receiver. The preStop hook of the prefill engine waits for KV that is not fetched yet.
    """
    for side in ROLES:
        parts.start(side)
        parts.until(side, "startupProbe", 200)
        assert parts.probe(side, "readinessProbe") == 503
        parts.connect(side)
        parts.until(side, "readinessProbe", 200)
    prefill, decode = parts.clients["prefill"], parts.clients["decode"]
    keys, token = ["tiny@1@0@1@bfloat16"], "0123456789abcdef0123456789abcdef"
    at = prefill.welcome.fetch
    assert at is not None and at.port == parts.free(port(parts.container("prefill"), "fetch"))
    prefill.keep("kept", token, keys, tokens=CHUNK_TOKENS, upto=CHUNK_TOKENS, keep_ms=60_000)
    parts.until("prefill", "readinessProbe", 200)

    hook = parts.pods["prefill"].container("engine")["lifecycle"]["preStop"]["exec"]["command"]
    env = {"PD_SIDECAR_SOCKET": str(parts.socket("prefill"))}
    drain = Process("drain", [BINARIES / hook[0], *hook[1:]], parts.tmp / "drain.log", env)
    try:
        parts.until("prefill", "readinessProbe", 503)
        assert drain.alive, drain.tail()
        decode.expect("wanted", token, at, epoch=prefill.welcome.epoch, keep_ms=60_000)
        decode.await_("wanted", keys, tokens=CHUNK_TOKENS, have_tokens=0, deadline_ms=30_000)
        assert moved(parts, "kept", "wanted") == b"kv" * (LAYOUT.chunk_bytes // 2)
        until("the hook does not end", lambda: settled(parts) and not drain.alive, process=parts.processes["prefill"])
        assert drain.wait(BOUND_S) == 0, drain.tail()
    finally:
        drain.kill()
    for side in ROLES:
        parts.clients.pop(side).close()
        assert parts.end(side) < IDLE_END_S


def settled(parts: Parts) -> bool:
    """Lets both engines hear their sidecars. Returns true, so that it can stand in a condition."""
    for client in parts.clients.values():
        client.wait(0.02)
    return True


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
