"""Loads the dashboard and the alerts of `deploy/monitoring` into a real Prometheus that scrapes a real pair.

Scripted engines move real KV between two real sidecars behind a real proxy. Each query of the dashboard must give data,
no alert may fire for a healthy pair, and alerts must fire in the faults that they are for.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
import yaml
import zmq
from harness.client import call
from harness.kv_engine import LAYOUT, KvEngine
from harness.ports import free_port
from harness.prometheus import (
    ALERTS,
    DASHBOARD,
    MONITORING,
    Prometheus,
    needs_prometheus,
    of_engines,
    panels,
    promtool,
)
from harness.proxy import Proxy
from harness.sidecar import CHUNK_TOKENS, NO_PUSH, ROOT, Sidecar, SidecarOptions
from harness.store import Store
from msgspec.structs import replace
from rendered import Manifest, manifests, pods

from pd_sidecar.client import Client
from pd_sidecar.sidecar.wire import Hello
from pd_sidecar.store.client import Bounds, StoreClient

SLOTS = 16
CLIENTS = 2
HERE = Path(__file__).parent
# The metrics of our programs; the connector's metrics begin with `vllm:`.
METRIC = re.compile(r"(?<!:)\bpd_(?:sidecar|proxy|store)_\w+")

# These alerts need faults that no test makes cheaply. tests/deploy/alerts.test.yaml raises them from made series.
ONLY_SIMULATED = {"PdSharedRegistryFails", "PdSlotsQuarantined", "PdVersionsDiffer"}
# The proxy has this metric only with --etcd. The store has these only with --remote, or after it ended a connection.
NOT_AT_FIRST = {"pd_proxy_shared_registry_total", "pd_store_remote_away", "pd_store_connections_closed_total"}


class Engine(KvEngine):
    """An engine that ends connections without an answer while `broken` is true."""

    broken = False

    def serve(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.broken:
            raise ConnectionAbortedError("the test wants this")
        return super().serve(body)


class Fleet:
    """A proxy, a pair of sidecars with engines, a store, clients, and a Prometheus."""

    def __init__(self, folder: Path, logs: Path, stack: ExitStack) -> None:
        self.proxy = Proxy(logs, ["--breaker-failures", "2", "--call-back-every", "500ms"])
        self.sides: dict[str, Sidecar] = {}
        self.engines: dict[str, Engine] = {}
        self.load, self._stop = threading.Event(), threading.Event()
        self.numbers = itertools.count()
        self.proxy.start()
        stack.callback(self.proxy.stop)
        for side, role in (("prefill", "sender"), ("decode", "receiver")):
            options = SidecarOptions(
                role, SLOTS * LAYOUT.chunk_bytes, transport="tcp", proxy=self.proxy.registration,
                keys={"register_ms": 500},
            )  # fmt: skip
            sidecar = self.sides[side] = Sidecar(options, folder, logs)
            engine = self.engines[side] = Engine(side, sidecar.socket)
            options.engine_url = engine.url
            sidecar.start()
            stack.callback(sidecar.stop)
            engine.start()
            stack.callback(engine.stop)
        self.proxy.wait_ready()
        small = ("--memory", "16MiB", "--max-value", "1MiB", "--in-flight", "4MiB")
        self.store = Store(logs, *small, "--disk", folder / "store", "--disk-size", "1GiB")
        self.store.start()
        stack.callback(self.store.stop)
        # This store starts later. Nothing is at the address of its remote store.
        self.lost = Store(logs, *small, "--remote", f"redis://127.0.0.1:{free_port()}/0")
        self.prometheus = Prometheus(folder, logs)
        self.prometheus.start(
            {
                "front": [self.proxy.url],
                "sides": [side.admin for side in self.sides.values()],
                "stores": [self.store.admin, self.lost.admin],
            }
        )
        stack.callback(self.prometheus.stop)
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        stack.callback(self._stop.set)

    def _ask(self, client: int) -> None:
        """Sends one request after the other while `load` is set, and puts and gets values. No two prompts are equal."""
        number = client
        store = StoreClient(f"lm://127.0.0.1:{self.store.port}", Bounds(timeout_s=5.0))
        while not self._stop.is_set():
            if not self.load.wait(0.1):
                continue
            prompt = [number, *range((100, 255, 700)[number % 3])]
            number += CLIENTS
            with suppress(OSError, HTTPException):
                call(f"{self.proxy.url}/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 4})
            with suppress(OSError):
                use(store, b"%d" % number)
        store.close()

    def push(self, request_id: str, prompt: list[int]) -> None:
        """Sends a prefill leg past the proxy, so that no decode leg waits for its KV."""
        receiver = self.sides["decode"]
        spec = {
            "receiver_host": receiver.host, "receiver_init_port": [receiver.init_port],
            "receiver_alloc_port": [receiver.alloc_port], "req_id": request_id,
        }  # fmt: skip
        self.engines["prefill"].serve(
            {"prompt": prompt, "kv_transfer_params": {"do_remote_decode": True, "disagg_spec": spec}}
        )

    def park(self, request_id: str, prompt: list[int]) -> None:
        """Sends a decode leg past the proxy. Returns when its transfer has ended."""
        params = {"do_remote_prefill": True, "disagg_spec": {"req_id": request_id}}
        self.engines["decode"].serve({"prompt": prompt, "kv_transfer_params": params})

    def fires(self, fault: Callable[[], None], *alerts: str) -> None:
        """Repeats a fault until all these alerts fire, because a single event may be too rare for a threshold."""
        missing = set(alerts)

        def all_fire() -> bool:
            fault()
            missing.difference_update(self.prometheus.firing())
            return not missing

        self.prometheus.until(all_fire, lambda: f"{missing} do not fire")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> Iterator[Fleet]:
    if NO_PUSH:
        pytest.skip("nothing can be pushed")
    with ExitStack() as stack:
        yield Fleet(tmp_path_factory.mktemp("monitoring"), logs, stack)


@needs_prometheus
def test_promtool_accepts_the_files() -> None:
    assert "SUCCESS" in promtool("check", "rules", ALERTS)
    assert "SUCCESS" in promtool("check", "config", MONITORING / "prometheus.yaml")


@needs_prometheus
def test_each_alert_fires_for_made_series_and_only_then() -> None:
    """The alerts fire with their real times and thresholds: tests/deploy/alerts.test.yaml lists all that fire."""
    assert "SUCCESS" in promtool("test", "rules", HERE / "alerts.test.yaml")
    tested = set(re.findall(r'alertname="(\w+)"', (HERE / "alerts.test.yaml").read_text()))
    assert tested == alert_names()


@needs_prometheus
def test_every_panel_shows_data_and_no_alert_fires(fleet: Fleet) -> None:
    fleet.load.set()
    queries = [query for _, all_of in panels() if not of_engines(all_of) for query in all_of]
    assert len(queries) > 40

    def empty() -> list[str]:
        return [query for query in queries if not fleet.prometheus.has_data(query)]

    fleet.prometheus.until(lambda: not empty(), lambda: f"queries without data: {empty()}")
    decode = fleet.engines["decode"]
    assert decode.bytes_checked > 0 and decode.wrong == []
    # The rates have seen the whole start by now.
    firing = fleet.prometheus.firing
    fleet.prometheus.until(lambda: not firing(), lambda: f"{firing()} fire for a healthy pair")
    (sample,) = fleet.prometheus.query('sum(pd_sidecar_transferred_bytes_total{side="receiver"})')
    assert float(sample["value"][1]) > 0
    # Each metric that the dashboard and the alerts name was scraped.
    named = set(METRIC.findall(DASHBOARD.read_text() + ALERTS.read_text()))
    assert len(named) > 40 and named - fleet.prometheus.names() == NOT_AT_FIRST


@needs_prometheus
def test_alerts_fire_in_their_faults(fleet: Fleet) -> None:
    """Plants one fault after the other; the last faults end processes. Needs no certain state before."""
    prefill, decode = fleet.engines["prefill"], fleet.engines["decode"]
    receiver, seen = fleet.sides["decode"], set[str]()

    def fires(fault: Callable[[], None], *alerts: str) -> None:
        fleet.fires(fault, *alerts)
        seen.update(alerts)

    def too_large() -> None:
        fleet.push(f"large-{next(fleet.numbers)}", [1] * (2 * SLOTS * CHUNK_TOKENS))

    def other_keys() -> None:
        """The two engines hash the same request to different keys."""
        name = f"keys-{next(fleet.numbers)}"
        waits = threading.Thread(target=fleet.park, args=(name, [2] * 300))
        waits.start()
        fleet.push(name, [3] * 300)
        waits.join()

    # Without other requests, the faults are all that the sidecars count.
    fleet.load.clear()
    fires(too_large, "PdBufferTooSmall", "PdKvNotMoved")
    fires(other_keys, "PdPeersDoNotFit")
    with ExitStack() as stack:
        fires(lambda: garbage(stack, fleet), "PdMalformedFrames", "PdPeersRefused", "PdRegistrationRefused")
        stack.callback(wrong_engine(receiver.socket).close)
        fires(lambda: None, "PdEngineRefused")

    fleet.load.set()
    prefill.broken = True
    fires(lambda: None, "PdPrefillBypassed", "PdInstancePaused")
    prefill.broken, decode.broken = False, True
    fires(lambda: None, "PdRequestsFail")
    decode.broken = False
    receiver.kill()
    fires(
        lambda: fleet.push(f"lost-{next(fleet.numbers)}", [4] * 10),
        "PdSidecarDown", "PdNoDecodeInstance", "PdRequestsRejected", "PdLinksLost",
    )  # fmt: skip
    prefill.stop()
    fires(lambda: None, "PdSidecarNotReady", "PdNoPrefillInstance")
    with ExitStack() as stack:
        lose_the_remote_store(stack, fleet, fires)
    fleet.store.kill()
    fires(lambda: None, "PdStoreDown")
    fleet.load.clear()
    fleet.proxy.kill()
    fires(lambda: None, "PdProxyDown")
    assert seen == alert_names() - ONLY_SIMULATED


def alert_names() -> set[str]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"]}


def garbage(stack: ExitStack, fleet: Fleet) -> None:
    """Sends what is no message to the ports. The sockets stay open until `stack` ends, so that all is read."""
    context, receiver = zmq.Context.instance(), fleet.sides["decode"]
    stranger = stack.enter_context(context.socket(zmq.DEALER))
    stranger.connect(f"tcp://127.0.0.1:{receiver.alloc_port}")
    stranger.send_multipart([b"", b"\x01\x02"])
    pusher = stack.enter_context(context.socket(zmq.PUSH))
    pusher.connect(f"tcp://{fleet.proxy.registration}")
    pusher.send(b"\x01\x02")
    stream = socket.create_connection(("127.0.0.1", receiver.init_port), timeout=5)
    stack.callback(stream.close)
    with suppress(OSError):
        stream.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4)


def use(store: StoreClient, key: bytes) -> list[bool]:
    """Puts a value and gets it again."""
    store.put([(key, memoryview(b"kv" * 500))])
    return store.get([(key, memoryview(bytearray(1000)))])


def lose_the_remote_store(stack: ExitStack, fleet: Fleet, fires: Callable[..., None]) -> None:
    """Starts a store without its remote store, and sends bytes that are no request to it."""
    fleet.lost.start()
    stack.callback(fleet.lost.stop)
    client = StoreClient(f"lm://127.0.0.1:{fleet.lost.port}", Bounds(timeout_s=5.0))
    stack.callback(client.close)

    def fault() -> None:
        client.get([(b"missing-%d" % next(fleet.numbers), memoryview(bytearray(1000)))])
        stranger = socket.create_connection(("127.0.0.1", fleet.lost.port), timeout=5)
        stack.callback(stranger.close)
        stranger.sendall(b"\xff" * 400)

    fires(fault, "PdStoreRemoteAway", "PdStoreClosesConnections")


def wrong_engine(path: Path) -> Client:
    """Returns a client whose layout is not the layout of the engine that the sidecar serves. It keeps trying."""
    layout = replace(LAYOUT, layers=LAYOUT.layers + 1)
    return Client(str(path), Hello(v=1, engine="other", role="decode", rank=0, world_size=1, layout=layout))


def test_the_operator_gets_the_same_rules() -> None:
    """The page's command makes a PrometheusRule with our groups."""
    page = (ROOT / "docs" / "monitoring.md").read_text()
    (command,) = re.findall(r"^(\{ printf .*?\}) \| kubectl ", page, re.DOTALL | re.MULTILINE)
    made = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    rule = yaml.safe_load(made.stdout)
    check_custom(rule)
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text())


def test_the_component_scrapes_every_pod_and_brings_the_dashboard(tmp_path: Path) -> None:
    """The page's kustomization adds the component to the base."""
    page = (ROOT / "docs" / "monitoring.md").read_text()
    (text,) = re.findall(r"^```yaml\n(# my-pd/kustomization.yaml\n.*?)```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "kustomization.yaml").write_text(text.replace("PATH", os.path.relpath(ROOT, tmp_path)))
    objects = {
        each["kind"]: each for each in manifests(str(tmp_path)) if each["metadata"]["name"].startswith("pd-sidecar")
    }
    monitor = objects["PodMonitor"]
    check_custom(monitor)
    (names,) = monitor["spec"]["selector"]["matchExpressions"]
    ports = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    for each in pods("overlays/store"):
        assert each.labels[names["key"]] in names["values"]
        scraped = {port["name"] for container in each.containers() for port in container.get("ports", [])} & ports
        assert scraped == {"pd-proxy": {"http"}, "pd-store": {"admin"}}.get(each.name, {"http", "admin"})
    (board,) = (each["data"] for each in manifests(str(tmp_path)) if each["metadata"]["name"] == "pd-sidecar-dashboard")
    assert json.loads(board["pd-sidecar.json"]) == json.loads(DASHBOARD.read_text())


def check_custom(manifest: Manifest) -> None:
    """Checks that an object of a custom resource has only the fields that our schema of their API has."""
    jsonschema = pytest.importorskip("jsonschema", reason="no jsonschema: custom resources not checked")
    name = f"{manifest['kind']}-{manifest['apiVersion'].replace('/', '-')}.yaml".lower()
    jsonschema.validate(manifest, yaml.safe_load((HERE / "schemas" / name).read_text()))
