"""Senders and receivers with one common interface: this project's sidecars, and LMCache's own backends.

For the sidecars, a client takes the place of the engine.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import zmq

from harness.drop_in.chunks import CHUNK_TOKENS, LAYOUT, TOKEN_BYTES, Prompt, sum_of
from harness.drop_in.forked import START_BOUND_S, ForkedPeer
from harness.logs import LOGS
from harness.ports import free_port
from harness.process import Part
from harness.sidecar import SLOWNESS, Sidecar, SidecarOptions
from pd_sidecar.client import Client
from pd_sidecar.sidecar.wire import VERSION, Ended, Granted, Hello, Layout, Ready, Target

SLOTS = 256
BOUND_S = 40.0 * SLOWNESS
CONNECT_BOUND_S = 30.0 * SLOWNESS


@dataclass
class Put:
    """The outcome of a push."""

    # Number of chunks that the sender reports as handed over.
    written: int
    # The reason of a failure; None for a success.
    error: str | None = None


class Sender(Protocol):
    """Pushes a prompt's chunks to a receiver."""

    name: str
    notices: Notices

    def put(self, req: str, to: Target, prompt: Prompt, batch: int | None = None) -> Put: ...
    def restart(self) -> None: ...
    def stop(self) -> None: ...


class Receiver(Protocol):
    """Receives the chunks of a prompt."""

    name: str

    @property
    def target(self) -> Target: ...

    def get(self, req: str, prompt: Prompt) -> list[str | None]: ...
    def held(self) -> int: ...
    def restart(self) -> None: ...
    def stop(self) -> None: ...


class Notices:
    """Takes the place of the proxy's registration port and collects `ProxyNotif` messages."""

    def __init__(self) -> None:
        self._socket: Any = zmq.Context.instance().socket(zmq.PULL)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.raw: list[bytes] = []
        self.seen: dict[str, dict[str, Any]] = {}
        self.count: Counter[str] = Counter()

    def wait(self, req: str, bound_s: float = BOUND_S, ranks: int = 1) -> dict[str, Any] | None:
        """Returns the newest notice of a request after `ranks` ranks have sent a notice, or None after `bound_s`."""
        import msgspec

        deadline = time.monotonic() + bound_s
        while self.count[req] < ranks:
            left = max(0, deadline - time.monotonic())
            if not self._socket.poll(left * 1000):
                return None
            raw = self._socket.recv()
            message = msgspec.msgpack.decode(raw)
            if message["type"] == "ProxyNotif":
                self.raw.append(raw)
                self.seen[message["req_id"]] = message
                self.count[message["req_id"]] += 1
        return self.seen[req]

    def close(self) -> None:
        self._socket.close(linger=0)


class LmcachePeer(Part):
    """Real LMCache in its own process; see `peer.py`."""

    def __init__(
        self,
        role: str,
        mode: str,
        config: dict[str, object],
        slots: int = SLOTS,
        layout: Layout = LAYOUT,
        file: Path | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.name = f"lmcache-{mode}-{role}" + (f"-{rank}" if ranks > 1 else "")
        self._options = {
            "role": role, "mode": mode, "config": config, "slots": slots,
            "rank": rank, "world_size": ranks,
            "model": layout.model, "layers": layout.layers, "kv_heads": layout.kv_heads, "head_size": layout.head_size,
        }  # fmt: skip
        if file is not None:
            self._options["file"] = str(file)
        self.start()

    def start(self) -> None:
        port = free_port()
        options = {**self._options, "port": port}
        self.process = ForkedPeer(self.name, options, LOGS / f"{self.name}.log")
        deadline = time.monotonic() + START_BOUND_S
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", port), 1)
                break
            except OSError:
                if not self.process.alive or time.monotonic() > deadline:
                    raise self.process.failure("does not take commands") from None
                time.sleep(0.1)
        self._connection = connection
        self._lines = connection.makefile("rw", buffering=1)

    def do(self, what: str, bound_s: float = BOUND_S, **command: object) -> dict[str, Any]:
        assert self.process is not None
        self._connection.settimeout(bound_s)
        try:
            self._lines.write(json.dumps({"do": what, **command}) + "\n")
            line = self._lines.readline()
        except OSError:
            raise self.process.failure(f"no answer to {what} within {bound_s:g} s") from None
        if not line:
            raise self.process.failure(f"ended at {what}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise self.process.failure(f"{what}: {answer['failed']}")
        return answer

    def stop(self) -> None:
        self._connection.close()
        self.kill()

    def restart(self) -> None:
        self.stop()
        self.start()


class LmcacheSender(LmcachePeer):
    """A rank of LMCache's prefill side."""

    def __init__(
        self, mode: str, proxy_port: int | None = None, layout: Layout = LAYOUT, rank: int = 0, ranks: int = 1
    ) -> None:
        self.notices = Notices()
        proxy: dict[str, object] = {"pd_proxy_host": "127.0.0.1", "pd_proxy_port": proxy_port or self.notices.port}
        super().__init__("sender", mode, proxy, layout=layout, rank=rank, ranks=ranks)

    def put(self, req: str, to: Target | list[Target], prompt: Prompt, batch: int | None = None) -> Put:
        """Pushes a prompt's chunks to a receiver, which has one target per rank."""
        targets = [to] if isinstance(to, Target) else to
        answer = self.do(
            "put", req=req, to=of_targets(targets), keys=prompt.keys, tokens=prompt.tokens, seed=prompt.seed,
            batch=batch, timeout_s=15,
        )  # fmt: skip
        return Put(answer["written"], "; ".join(answer["errors"]) or None)


class LmcacheReceiver(LmcachePeer):
    """A rank of LMCache's decode side."""

    def __init__(
        self,
        mode: str,
        slots: int = SLOTS,
        layout: Layout = LAYOUT,
        rank: int = 0,
        targets: list[Target] | None = None,
    ) -> None:
        self.targets = targets or [new_target()]
        self.target = self.targets[rank]
        ports = {
            "pd_peer_init_port": [to.init_port for to in self.targets],
            "pd_peer_alloc_port": [to.alloc_port for to in self.targets],
        }
        config: dict[str, object] = {"pd_peer_host": "127.0.0.1", **ports}
        super().__init__("receiver", mode, config, slots, layout, rank=rank, ranks=len(self.targets))

    def get(self, req: str, prompt: Prompt) -> list[str | None]:
        sums: list[str | None] = self.do("get", keys=prompt.keys, tokens=prompt.tokens)["sums"]
        return sums

    def held(self) -> int:
        """Returns the number of chunks for which the receiver has stored KV or reserved memory."""
        keys: int = self.do("held")["keys"]
        return keys


@dataclass
class _Ours:
    """A sidecar, with a client in the place of its engine."""

    folder: Path
    name: str
    role: str = ""
    slots: int = SLOTS
    keys: dict[str, object] = field(default_factory=dict)
    lmcache: dict[str, object] = field(default_factory=dict)
    proxy: str | None = None
    engine_url: str = "http://127.0.0.1:1"
    ranks: int = 1

    def begin(self) -> None:
        # LMCache's agents connect over UCX's TCP, even on one host.
        own = {"nixl_over_tcp": "trusted", **self.keys}
        options = SidecarOptions(
            role=self.role, buffer_bytes=self.slots * LAYOUT.chunk_bytes, proxy=self.proxy, transport="auto",
            keys=own, lmcache=self.lmcache, engine_url=self.engine_url, ranks=self.ranks,
        )  # fmt: skip
        self.sidecar = Sidecar(options, self.folder, LOGS, name=self.name)
        self.sidecar.start()
        self._connect()

    @property
    def client(self) -> Client:
        """Returns the client of rank 0."""
        return self.clients[0]

    def _connect(self) -> None:
        leg = "prefill" if self.role == "sender" else "decode"
        hellos = [Hello(VERSION, "test", leg, rank, self.ranks, LAYOUT) for rank in range(self.ranks)]
        self.clients = [Client.connect(str(self.sidecar.socket), hello, CONNECT_BOUND_S) for hello in hellos]

    def _close(self) -> None:
        for client in self.clients:
            client.close()

    def restart(self) -> None:
        """Kills the sidecar with SIGKILL, as a crash would, and starts it again."""
        self._close()
        self.sidecar.kill()
        self.sidecar.start()
        self._connect()

    def stop(self) -> None:
        self._close()
        self.sidecar.stop()

    def until_ended(self, req: str, bound_s: float = BOUND_S, rank: int = 0) -> Iterator[Any]:
        """Yields the sidecar's events of a request up to its end. Raises an error if the request does not end in
        `bound_s`.
        """
        deadline = time.monotonic() + bound_s
        while time.monotonic() < deadline:
            for event in self.clients[rank].wait(0.2):
                if getattr(event, "req", req) == req:
                    yield event
                    if isinstance(event, Ended):
                        return
        raise AssertionError(f"{self.name}: request {req} has not ended within {bound_s:g} s")


class OurSender(_Ours):
    """A sidecar of the prefill side."""

    def __init__(
        self,
        folder: Path,
        name: str = "our-sender",
        slots: int = SLOTS,
        proxy: str | None = None,
        engine_url: str = "http://127.0.0.1:1",
        ranks: int = 1,
        **keys: object,
    ) -> None:
        self.notices = Notices()
        proxy = proxy or f"127.0.0.1:{self.notices.port}"
        super().__init__(folder, name, "sender", slots, keys, proxy=proxy, engine_url=engine_url, ranks=ranks)
        self.begin()

    def put(self, req: str, to: Target, prompt: Prompt, batch: int | None = None) -> Put:
        first = min(prompt.tokens, (batch or prompt.chunks) * CHUNK_TOKENS)
        client = self.clients[prompt.rank]
        client.reserve(req, to, prompt.keys, tokens=prompt.tokens, upto=first)
        if first < prompt.tokens:
            client.computing(req, prompt.tokens)
        written = 0
        for event in self.until_ended(req, rank=prompt.rank):
            if isinstance(event, Granted):
                for chunk, slot in zip(event.chunks, event.slots, strict=True):
                    data = prompt.chunk(chunk)
                    client.slot(slot)[: len(data)] = data
                if event.chunks:
                    client.staged(req, event.chunks)
                written += len(event.chunks)
            elif isinstance(event, Ended):
                return Put(written, event.reason)
        raise AssertionError("unreachable")


class OurReceiver(_Ours):
    """A sidecar of the decode side."""

    def __init__(
        self,
        folder: Path,
        name: str = "our-receiver",
        slots: int = SLOTS,
        lmcache: dict[str, object] | None = None,
        proxy: str | None = None,
        engine_url: str = "http://127.0.0.1:1",
        ranks: int = 1,
        **keys: object,
    ) -> None:
        super().__init__(folder, name, "receiver", slots, keys, lmcache or {}, proxy, engine_url, ranks)
        self.begin()
        self.ended: str | None = None

    @property
    def target(self) -> Target:
        return self.targets[0]

    @property
    def targets(self) -> list[Target]:
        """Returns one target per rank."""
        ports = zip(self.sidecar.init_ports, self.sidecar.alloc_ports, strict=True)
        return [Target(self.sidecar.host, init, alloc) for init, alloc in ports]

    def get(self, req: str, prompt: Prompt, have: int = 0, written: bool = True) -> list[str | None]:
        sums: list[str | None] = [None] * prompt.chunks
        if not prompt.chunks:
            return sums
        client = self.clients[prompt.rank]
        client.await_(
            req,
            prompt.keys,
            tokens=prompt.tokens,
            have_tokens=have,
            deadline_ms=int(15_000 * SLOWNESS),
            written=written,
        )
        for event in self.until_ended(req, rank=prompt.rank):
            if isinstance(event, Ready):
                for chunk, slot in zip(event.chunks, event.slots, strict=True):
                    count = min(CHUNK_TOKENS, prompt.tokens - chunk * CHUNK_TOKENS) * TOKEN_BYTES
                    sums[chunk] = sum_of(bytes(client.slot(slot)[:count]))
                client.release(req, event.chunks)
            elif isinstance(event, Ended):
                self.ended = event.reason
        return sums

    def held(self) -> int:
        """Returns the number of slots that are held or in quarantine."""
        return sum(self.sidecar.slots()[1:])


def new_target() -> Target:
    return Target("127.0.0.1", free_port(), free_port())


def of_targets(to: list[Target]) -> dict[str, object]:
    """Returns the targets in the form of a `disagg_spec`."""
    ports = {"init_port": [each.init_port for each in to], "alloc_port": [each.alloc_port for each in to]}
    return {"host": to[0].host, **ports}
