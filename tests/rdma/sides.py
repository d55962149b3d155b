"""Two sidecars over the emulated devices, with clients in the place of their engines, and a watcher of the landing
buffer.
"""

from __future__ import annotations

import signal
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness.drop_in.chunks import CHUNK_TOKENS, LAYOUT, TOKEN_BYTES, Prompt, sum_of
from harness.logs import LOGS
from harness.sidecar import SLOWNESS, Sidecar, SidecarOptions

from pd_sidecar.client import Client
from pd_sidecar.sidecar.wire import VERSION, Ended, Granted, Hello, Ready, Target
from rdma.devices import LINK_MS, NO_SENDER_MS

BOUND_S = 20.0 * SLOWNESS

# A lease lasts three times as long. An emulated core can keep a sidecar from its work for some seconds.
HEARTBEAT_MS = 5000
PATIENT: dict[str, object] = {"wait_ms": 30_000, "stall_ms": 60_000, "max_wait_ms": 30_000}

# A PID namespace and an IPC namespace of its own are another host to a sidecar and to UCX's shared memory: the receiver
# can neither watch the sender's process nor share memory with it.
OTHER_HOST = ["unshare", "--pid", "--ipc", "--fork", "--kill-child=SIGKILL"]


def device(name: str) -> dict[str, str]:
    """Returns the environment of a sidecar that uses this device, by reliable connections."""
    return {"UCX_TLS": "rc_verbs,ud_verbs,self", "UCX_NET_DEVICES": f"{name}:1"}


class Sender:
    """A sidecar of the prefill side on `rxe1`, which reaches the receiver over the cable."""

    def __init__(self, receiver: Receiver, name: str, folder: Path, within: list[str] | None = None) -> None:
        options = SidecarOptions(
            "sender", 16 * LAYOUT.chunk_bytes, transport="nixl", env=device("rxe1"), within=within or [],
            keys={"id": name, "heartbeat_ms": HEARTBEAT_MS, "link_ms": LINK_MS, **PATIENT},
        )  # fmt: skip
        self.receiver = receiver
        self.sidecar = Sidecar(options, folder, LOGS, name=name)
        self.start()

    def start(self) -> None:
        self.sidecar.start()
        hello = Hello(VERSION, "test", "prefill", 0, 1, LAYOUT)
        self.client = Client.connect(str(self.sidecar.socket), hello, timeout_s=10 * SLOWNESS)

    def kill(self) -> float:
        """Kills the sidecar with SIGKILL. Returns the time at once: the receiver frees the slots soon after the end of
        the process, and a test wants to see them in quarantine.
        """
        assert self.sidecar.process is not None
        self.sidecar.process.signal(signal.SIGKILL)
        killed = time.monotonic()
        self.client.close()
        return killed

    def stop(self) -> None:
        self.client.close()
        self.sidecar.kill()

    def granted(self, req: str, prompt: Prompt) -> dict[int, int]:
        """Begins a request and returns the slot of each chunk. The decode side must have room for all of them."""
        decode, to = self.receiver.client, self.receiver.target
        decode.await_(req, prompt.keys, tokens=prompt.tokens, have_tokens=0, deadline_ms=200_000)
        self.client.reserve(req, to, prompt.keys, tokens=prompt.tokens, upto=prompt.tokens)
        slots: dict[int, int] = {}
        deadline = time.monotonic() + BOUND_S
        while len(slots) < prompt.chunks:
            assert time.monotonic() < deadline, f"{req}: granted only {slots}"
            for message in self.client.wait(0.05):
                assert not (isinstance(message, Ended) and message.req == req), message
                if isinstance(message, Granted) and message.req == req:
                    slots.update(zip(message.chunks, message.slots, strict=True))
        return slots

    def stage(self, req: str, prompt: Prompt, slots: dict[int, int]) -> None:
        """Fills these chunks and lets the sidecar send them."""
        for chunk, slot in slots.items():
            data = prompt.chunk(chunk)
            self.client.slot(slot)[: len(data)] = data
        self.client.staged(req, list(slots))

    def push(self, req: str, prompt: Prompt) -> set[int]:
        """Pushes a request and checks every chunk twice: when it arrives, and before it is released. Returns the
        landing slots.
        """
        self.stage(req, prompt, self.granted(req, prompt))
        used: dict[int, int] = {}
        ended: dict[str, str | None] = {}
        deadline = time.monotonic() + BOUND_S
        while len(ended) < 2:
            assert time.monotonic() < deadline, f"{req}: ended only at {list(ended)}"
            for message in self.client.wait(0.02):
                if isinstance(message, Ended) and message.req == req:
                    ended["prefill"] = message.reason
            for message in self.receiver.client.wait(0.02):
                if isinstance(message, Ready) and message.req == req:
                    landed = dict(zip(message.chunks, message.slots, strict=True))
                    for _ in range(2):
                        for chunk, slot in landed.items():
                            assert self.receiver.sum(slot, prompt, chunk) == sum_of(prompt.chunk(chunk)), (req, chunk)
                        time.sleep(0.1)
                    used |= landed
                    self.receiver.client.release(req, message.chunks)
                elif isinstance(message, Ended) and message.req == req:
                    ended["decode"] = message.reason
        assert ended == {"prefill": None, "decode": None}, ended
        assert used.keys() == set(range(prompt.chunks))
        return set(used.values())


class Receiver:
    """A sidecar of the decode side on `rxe0`."""

    def __init__(self, folder: Path, slots: int, **keys: object) -> None:
        options = SidecarOptions(
            "receiver", slots * LAYOUT.chunk_bytes, transport="nixl", env=device("rxe0"),
            keys={"no_sender_ms": NO_SENDER_MS, "park_ms": 3000, **PATIENT, **keys},
        )  # fmt: skip
        self.slots = slots
        self.sidecar = Sidecar(options, folder, LOGS)
        self.sidecar.start()
        self.client = self.connect()

    def connect(self) -> Client:
        hello = Hello(VERSION, "test", "decode", 0, 1, LAYOUT)
        return Client.connect(str(self.sidecar.socket), hello, timeout_s=10 * SLOWNESS)

    @property
    def target(self) -> Target:
        return Target(self.sidecar.host, self.sidecar.init_port, self.sidecar.alloc_port)

    @property
    def quarantined(self) -> int:
        return self.sidecar.slots()[2]

    def sum(self, slot: int, prompt: Prompt, chunk: int) -> str:
        count = min(CHUNK_TOKENS, prompt.tokens - chunk * CHUNK_TOKENS) * TOKEN_BYTES
        return sum_of(bytes(self.client.slot(slot)[:count]))

    def wait_quarantined(self, slots: int) -> float:
        """Returns the time at which this number of slots is in quarantine."""
        deadline = time.monotonic() + BOUND_S
        while self.quarantined != slots:
            assert time.monotonic() < deadline, self.sidecar.status()
            time.sleep(0.02)
        return time.monotonic()

    def wait_empty(self) -> float:
        """Returns the time at which every slot is free."""
        self.sidecar.wait_empty(BOUND_S)
        return time.monotonic()

    def stop(self) -> None:
        self.client.close()
        self.sidecar.stop()


@dataclass
class Watcher:
    """Notes each change of a slot of the landing buffer, whoever made it."""

    receiver: Receiver
    # Time and slot of each change that was seen.
    changes: list[tuple[float, int]] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        views = [self.receiver.client.slot(slot) for slot in range(self.receiver.slots)]
        sums = [zlib.crc32(view) for view in views]
        while not self._over.is_set():
            for slot, view in enumerate(views):
                new = zlib.crc32(view)
                if new != sums[slot]:
                    sums[slot] = new
                    self.changes.append((time.monotonic(), slot))
            time.sleep(0.01)

    def since(self, when: float) -> list[float]:
        """Returns the times of the changes after `when`."""
        return [time for time, _ in list(self.changes) if time > when]

    def slots_since(self, when: float) -> set[int]:
        """Returns the slots that changed after `when`."""
        return {slot for time, slot in list(self.changes) if time > when}


@contextmanager
def watched(receiver: Receiver) -> Iterator[Watcher]:
    watcher = Watcher(receiver)
    thread = threading.Thread(target=watcher.run)
    thread.start()
    try:
        yield watcher
    finally:
        watcher._over.set()
        thread.join()
