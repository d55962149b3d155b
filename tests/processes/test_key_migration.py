"""Gives keys to a running fleet: `auth: off`, then `prefer`, then `require`, one process after the other, under load.

Two proxies share their instances over etcd, because no single process can restart without a gap. Clients try the other
proxy if one is away, as a load balancer does. Scripted engines move real KV, and compare each byte.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from harness.client import call, get_json
from harness.kv_engine import LAYOUT, KvEngine, text_of
from harness.ports import free_port
from harness.process import Process
from harness.proxy import Proxy
from harness.sidecar import NO_PUSH, ROOT, Sidecar, SidecarOptions
from harness.waiting import until
from test_keys import Fleet

ETCD = Path(os.environ.get("ETCD", ROOT / "target" / "etcd" / "usr" / "bin" / "etcd"))
CLIENTS = 3
BOUND_S = 120.0
LEAST = 100

pytestmark = [
    pytest.mark.skipif(NO_PUSH, reason="nothing can be pushed"),
    pytest.mark.skipif(not ETCD.exists(), reason=f"no {ETCD}: run make etcd"),
]


@contextmanager
def etcd(folder: Path) -> Iterator[str]:
    client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    flags = [
        "--name", "one", "--data-dir", str(folder / "etcd"),
        "--listen-client-urls", client, "--advertise-client-urls", client,
        "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"one={peer}",
    ]  # fmt: skip
    process = Process("etcd", [ETCD, *flags], folder / "etcd.log")
    try:
        yield client
    finally:
        process.kill()


@dataclass
class Load:
    """Clients that send one request after the other to both proxies."""

    proxies: list[Proxy]
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def run(self) -> None:
        while not self.stop.is_set():
            with self.lock:
                number = next(self.numbers)
            # Less than a chunk, one chunk, and several chunks; no two prompts are equal.
            prompt = [number, *range((100, 255, 700)[number % 3])]
            failure = self.ask(number, prompt)
            with self.lock:
                self.answered += 1
                if failure is not None:
                    self.failures.append(f"request {number}: {failure}")

    def ask(self, number: int, prompt: list[int]) -> str | None:
        """Sends a request, and returns what was wrong with the answer."""
        body = {"model": "m", "prompt": prompt, "max_tokens": 4}
        tried = []
        for proxy in (self.proxies[number % 2], self.proxies[1 - number % 2]):
            try:
                status, text = call(f"{proxy.url}/v1/completions", body, timeout_s=60.0)
            except OSError as error:
                # The proxy has not started, or its connection is refused.
                tried.append(str(error))
                continue
            except HTTPException as error:
                return f"half an answer: {error!r}"
            # The proxy drains, or it has just started and has not read the list of instances yet.
            if status == 503:
                tried.append(text)
                continue
            return None if status == 200 and f'"{text_of(prompt)}"' in text else f"{status} {text}"
        return f"no proxy takes it: {tried}"


def test_a_fleet_gets_keys_without_a_failed_request(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    roles = {"s0": "sender", "s1": "sender", "r0": "receiver", "r1": "receiver"}
    members = {fleet.key(name): (name, role) for name, role in roles.items()}
    members |= {fleet.key(name, "pd-proxy"): (name, "proxy") for name in ("p0", "p1")}
    fleet.write(members)
    with ExitStack() as stack:
        shared = stack.enter_context(etcd(tmp_path))
        proxies: dict[str, Proxy] = {}
        for name in ("p0", "p1"):
            (tmp_path / name).mkdir()
            proxy = proxies[name] = Proxy(tmp_path / name, ["--etcd", shared, "--call-back-every", "500ms"])
            proxy.start()
            stack.callback(proxy.stop)
        engines: dict[str, KvEngine] = {}
        sidecars: dict[str, Sidecar] = {}
        for name, role in roles.items():
            options = SidecarOptions(
                role, 32 * LAYOUT.chunk_bytes, transport="tcp", proxy=proxies[f"p{name[1]}"].registration,
                keys={"checksum": True, "park_ms": 3000, "register_ms": 500},
            )  # fmt: skip
            sidecars[name] = Sidecar(options, tmp_path, tmp_path, name=name)
            engine = KvEngine("prefill" if role == "sender" else "decode", sidecars[name].socket)
            engines[name] = engine
            sidecars[name].options.engine_url = engine.url
            sidecars[name].start()
            stack.callback(sidecars[name].stop)
            engine.start()
            stack.callback(engine.stop)

        def ready(proxy: Proxy) -> dict[str, Any]:
            return {i["id"]: i["standing"]["state"] for i in proxy.instances()}

        def whole() -> bool:
            return all(ready(proxy) == dict.fromkeys(roles, "ready") for proxy in proxies.values())

        def moved() -> int:
            return sum(engine.bytes_checked for engine in engines.values())

        until(lambda: str([ready(proxy) for proxy in proxies.values()]), whole, bound_s=BOUND_S)
        load = Load(list(proxies.values()))
        threads = [threading.Thread(target=load.run, daemon=True) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            for auth in ("prefer", "require"):
                for name in ("p0", "p1", *roles):
                    if name in proxies:
                        flags = fleet.settings(name, auth)
                        proxies[name].stop()
                        proxies[name].set_flags(
                            "--etcd", shared, "--call-back-every", "500ms", "--auth", auth,
                            "--key-file", str(flags["key_file"]), "--roster", str(flags["roster"]),
                        )  # fmt: skip
                        proxies[name].start()
                    else:
                        side = sidecars[name]
                        side.stop()
                        side.options = replace(side.options, keys={**side.options.keys, **fleet.settings(name, auth)})
                        side.start()
                    # The next process is restarted only when all are back, and KV moves to both decode sides again.
                    until(lambda: str([ready(proxy) for proxy in proxies.values()]), whole, bound_s=BOUND_S)
                    for decode in (engines["r0"], engines["r1"]):
                        before = decode.bytes_checked
                        until(
                            lambda: f"no KV: {load.failures} {decode.alone}",  # noqa: B023
                            lambda: decode.bytes_checked > before,  # noqa: B023
                            bound_s=BOUND_S,
                        )
            until(lambda: f"only {load.answered} requests", lambda: load.answered > LEAST, bound_s=BOUND_S)
        finally:
            load.stop.set()
            for thread in threads:
                thread.join(BOUND_S)
        assert load.failures == []
        assert load.answered > LEAST and moved() > 0
        assert [engine.wrong for engine in engines.values()] == [[]] * 4
        for name in roles:
            channels = {c["channel"]: c["protection"] for c in get_json(f"{sidecars[name].admin}/status")["channels"]}
            assert "a key of the roster" in channels["registration"]
        # Now a peer without a key gets nothing.
        for name in ("r0", "r1"):
            metrics = sidecars[name].metrics()
            assert metrics.sum("pd_sidecar_port_events", port="alloc", event="failed_handshakes") == 0
