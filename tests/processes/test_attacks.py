"""Repeats attacks that succeeded once, from another network namespace. Normal requests must succeed at the same time.

Sidecars and proxy do not listen on loopback but on the victim's end of a veth, as in a real network. The attacker is a
process at the other end (`harness/hostile.py`, `harness/forged.py`). No engine runs: clients and scripted servers take
the engines' place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import msgspec
import pytest
import zmq
from harness import hostile
from harness.client import call
from harness.forged import replaced
from harness.listening import listening
from harness.ports import free_port
from harness.proxy import Proxy
from harness.scripted import JsonHandler, serving
from harness.sidecar import CHUNK_TOKENS, NO_PUSH, ROOT, Sidecar, SidecarOptions
from test_strangers import LAYOUT, Sides, hello, keys
from test_two_hosts import ITS_END, OUR_END, other_host

from pd_sidecar.client import Client

pytestmark = pytest.mark.skipif(NO_PUSH, reason="nothing can be pushed")

SLOTS = 16
BOUND_S = 60.0
SECRET = b"a prompt of another tenant......"
ENDLESS = 49 << 20


@dataclass
class Field:
    """Two senders and a receiver on one host, and the command prefix that runs a program on the attacker's host."""

    within: list[str]
    folder: Path
    receiver: Sidecar
    # One sender uses shared memory, and the other sender uses the receiver's data port.
    senders: dict[str, Sidecar]
    decode: Client
    prefill: dict[str, Client]
    pushed: dict[str, int] = field(default_factory=lambda: {"nixl": 0, "tcp": 0})

    @property
    def parts(self) -> list[Sidecar]:
        return [self.receiver, *self.senders.values()]

    def check(self) -> None:
        """Pushes a request over each transport, and reads the bytes that arrived."""
        for wire, sender in self.senders.items():
            self.pushed[wire] += 1
            self.push(wire, f"check-{wire}-{os.getpid()}-{self.pushed[wire]}")
            (link,) = sender.status()["links"]
            assert link["transport"] == wire, link

    def push(self, wire: str, req: str) -> None:
        sides = Sides(self.senders[wire], self.receiver, self.prefill[wire], self.decode)
        moved = self.moved()
        assert sides.push(req, keys(req), keys(req), CHUNK_TOKENS + 7) == (None, None)
        assert self.moved() > moved, "no bytes were counted"

    def moved(self) -> float:
        return sum(sender.metrics().sum("pd_sidecar_transferred_bytes") for sender in self.senders.values())

    def attack(self, name: str, **given: object) -> Attacker:
        receiver = self.receiver
        return Attacker(
            self.within,
            "hostile.py",
            name,
            host=OUR_END,
            init_port=receiver.init_port,
            alloc_port=receiver.alloc_port,
            tcp_port=receiver.tcp_port,
            slots=SLOTS,
            layout=msgspec.to_builtins(LAYOUT),
            **given,
        )

    def under(self, attacker: Attacker) -> Any:
        """Pushes requests until the attack has ended, but at least twice. Returns the attacker's result."""
        for _ in range(2):
            self.check()
        deadline = time.monotonic() + BOUND_S
        while attacker.running:
            assert time.monotonic() < deadline, "the attack does not end"
            self.check()
        return attacker.answer()


class Attacker:
    """A hostile process on the other host."""

    running_ones: ClassVar[list[Attacker]] = []

    def __init__(self, within: list[str], script: str, *words: str, **given: object) -> None:
        command = [*within, sys.executable, str(ROOT / "tests" / "harness" / script), *words, json.dumps(given)]
        env = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=env)
        Attacker.running_ones.append(self)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def line(self) -> Any:
        """Returns the next line that the attacker prints while it runs."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=BOUND_S)[1]
        return json.loads(line)

    def answer(self) -> Any:
        """Ends the attacker, and returns the last line that it printed."""
        out, error = self.process.communicate(timeout=BOUND_S)
        assert self.process.returncode == 0, error
        return json.loads(out.strip().splitlines()[-1])

    @classmethod
    def end_all(cls) -> None:
        """Ends the attackers that a failed test has left running."""
        for attacker in cls.running_ones:
            if attacker.running:
                attacker.process.kill()
                attacker.process.communicate(timeout=BOUND_S)
        cls.running_ones.clear()


def off_loopback(sidecar: Sidecar) -> Sidecar:
    sidecar.host = OUR_END
    sidecar.admin = f"http://{OUR_END}:{urlsplit(sidecar.admin).port}"
    return sidecar


@pytest.fixture(scope="module")
def host() -> Iterator[list[str]]:
    with other_host() as within:
        yield within


@pytest.fixture(scope="module")
def victims(host: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    folder = tmp_path_factory.mktemp("attacked")
    keys_: dict[str, object] = {"checksum": True, "park_ms": 3000}
    options = SidecarOptions("receiver", SLOTS * LAYOUT.chunk_bytes, flags=["--insecure"], keys=keys_)
    receiver = off_loopback(Sidecar(options, folder, folder))
    senders = {}
    for wire, transport in (("nixl", "auto"), ("tcp", "tcp")):
        sending = replace(options, role="sender", transport=transport)
        senders[wire] = off_loopback(Sidecar(sending, folder, folder, name=f"sender-{wire}"))
    try:
        for part in (receiver, *senders.values()):
            part.start()
        decode = Client.connect(str(receiver.socket), hello("decode"), BOUND_S)
        prefill = {
            wire: Client.connect(str(sender.socket), hello("prefill"), BOUND_S) for wire, sender in senders.items()
        }
        yield Field(host, folder, receiver, senders, decode, prefill)
    finally:
        for part in (*senders.values(), receiver):
            part.stop()


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Checks after each test that the same processes serve, and that they hold nothing."""
    if "victims" not in request.fixturenames:
        yield
        Attacker.end_all()
        return
    victims: Field = request.getfixturevalue("victims")
    victims.check()
    before = victims.receiver.pid
    yield
    Attacker.end_all()
    victims.check()
    for part in victims.parts:
        assert part.running
        part.wait_empty()
    assert victims.receiver.pid == before


def buffer_of(pid: int) -> int:
    """Returns the address of a sidecar's buffer: its largest shared mapping."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, rights, *_ = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if "memfd:" in line and rights == "rw-s":
            found.append((last - first, first))
    return max(found)[1]


def tcp_ports(pid: int) -> list[int]:
    return sorted({int(at.rpartition(":")[2]) for at in listening(pid) if at.startswith("tcp ")})


def forge(within: list[str], port: int, address: int, seconds: float) -> Attacker:
    return Attacker(
        within, "forged.py",
        own=ITS_END, device=f"pdb{os.getpid()}", victim=OUR_END, port=port, address=address, bytes=len(SECRET),
        seconds=seconds,
    )  # fmt: skip


def test_forged_nixl_agents_read_a_sidecar_that_consents_to_them(host: list[str], tmp_path: Path) -> None:
    """Shows that the attack works if a sidecar allows NIXL over TCP. In the next test the same attack fails, because
    the sidecar does not allow it.
    """
    consent: dict[str, object] = {"nixl_over_tcp": "trusted"}
    options = SidecarOptions("receiver", SLOTS * LAYOUT.chunk_bytes, keys=consent, flags=["--insecure"])
    receiver = Sidecar(options, tmp_path, tmp_path)
    receiver.host = OUR_END
    try:
        receiver.start()
        decode = Client.connect(str(receiver.socket), hello("decode"), BOUND_S)
        decode.slot(0)[: len(SECRET)] = SECRET
        named = {urlsplit(receiver.admin).port, receiver.init_port, receiver.alloc_port, receiver.tcp_port}
        (ucx,) = set(tcp_ports(receiver.pid)) - named
        got = forge(host, ucx, buffer_of(receiver.pid), BOUND_S / 2).answer()
        assert bytes.fromhex(got["bytes"]) == SECRET, got
    finally:
        receiver.stop()


def test_a_forger_leaves_the_address_whole() -> None:
    """A forged address must not lose the two bytes that equal the attacker's port: then no attack would be tried."""
    address, port = bytes.fromhex("30978d17e47f0000"), bytes.fromhex("8d17")
    assert replaced(address + b":" + port, [(address, b"victims."), (port, b"vp")]) == b"victims.:vp"


def test_forged_nixl_agents_get_nothing(victims: Field) -> None:
    victims.decode.slot(SLOTS - 1)[: len(SECRET)] = SECRET
    for part in victims.parts:
        ports = tcp_ports(part.pid)
        assert victims.under(victims.attack("ports", ports=[*ports, *range(30_000, 30_050)])) == ports
    receiver = victims.receiver
    kept = buffer_of(receiver.pid) + (SLOTS - 1) * LAYOUT.chunk_bytes
    # Try a mapped address and an unmapped address. A read of an unmapped address once ended the process. A connect over
    # a veth takes much less than the time of these attacks.
    attackers = [
        forge(victims.within, port, address, seconds=2.0)
        for port in tcp_ports(receiver.pid)
        for address in (kept, 0xDEAD_0000)
    ]
    for attacker in attackers:
        got = victims.under(attacker)
        assert got["state"] != "DONE" and bytes.fromhex(got["bytes"]) == bytes(len(SECRET)), got
    assert bytes(victims.decode.slot(SLOTS - 1)[: len(SECRET)]) == SECRET


def test_thousands_of_sums_in_a_message_cost_what_it_weighs(victims: Field) -> None:
    process = victims.receiver.process
    assert process is not None
    began = process.cpu_seconds()
    answers = victims.under(victims.attack("sums", leases=4, messages=200))
    assert answers > 400
    # Half of the messages name the lease. These messages contain 1.4 million checksums of chunks of 64 KiB. To compute
    # all of them, the receiver would read 92 GB, which takes 5 s or more at the speed of memory.
    assert process.cpu_seconds() - began < 5.0


def test_data_connections_that_showed_a_lease_keep_nobody_out(victims: Field) -> None:
    attacker = victims.attack("data", connections=300)
    try:
        assert attacker.line() > 200, "landed"
        # Use a sender that has no connection yet.
        victims.prefill["tcp"].close()
        victims.senders["tcp"].restart()
        victims.prefill["tcp"] = Client.connect(str(victims.senders["tcp"].socket), hello("prefill"), BOUND_S)
        for _ in range(5):
            victims.check()
    finally:
        attacker.answer()


def test_an_identity_stays_with_its_connection(victims: Field) -> None:
    sender = hostile.Intruder(given(victims), "rightful")
    sender.alloc.close()
    sender.alloc = hostile.Peer(zmq.DEALER, OUR_END, victims.receiver.alloc_port, b"rightful")
    lease, slot = sender.lease()
    victims.under(victims.attack("identity", identity="rightful"))
    message = {"type": "Extend", "lease": lease, "epoch": sender.to_epoch, "granted": []}
    sender.alloc.send(message)
    answer = sender.alloc.answer()
    assert answer is not None and (answer["type"], answer["indexes"]) == ("More", [slot]), answer
    sender.give_back(lease)


def given(victims: Field) -> dict[str, Any]:
    receiver = victims.receiver
    ports = {"init_port": receiver.init_port, "alloc_port": receiver.alloc_port}
    return {"host": OUR_END, "layout": msgspec.to_builtins(LAYOUT), **ports}


def test_cancels_of_what_is_not_ones_own_end_nothing(victims: Field) -> None:
    sender = hostile.Intruder(given(victims), "rightful")
    lease, slot = sender.lease()
    ids = ["1", "2", "3", "rightful-1", *(f"check-tcp-{os.getpid()}-{n}" for n in range(1, 30))]
    victims.under(victims.attack("cancels", ids=ids, rounds=10, epoch=sender.to_epoch))
    sender.alloc.send({"type": "Extend", "lease": lease, "epoch": sender.to_epoch, "granted": []})
    answer = sender.alloc.answer()
    assert answer is not None and (answer["type"], answer["indexes"]) == ("More", [slot]), answer
    sender.give_back(lease)
    for wire in victims.senders:
        for req in ("1", "2", "3"):
            victims.push(wire, req)


class Scripted:
    """An engine's HTTP server on the victim's end of the veth. The server records the requests that it gets."""

    def __init__(self, stack: ExitStack) -> None:
        self.asked: list[str] = []
        scripted = self

        class Handler(JsonHandler):
            def do_GET(self) -> None:
                scripted.asked.append(f"GET {self.path}")
                self.answer({})

            def do_POST(self) -> None:
                scripted.asked.append(f"POST {self.path}")
                body = self.body()
                if body.get("stream") and body.get("prompt") == "endless":
                    self.never_end()
                    return
                kv = {"do_remote_prefill": True}
                first = {"first_tok": 5} if body.get("max_tokens") == 1 else {}
                text = {"text": "as asked: " + str(body.get("prompt")), "index": 0, "finish_reason": "stop"}
                self.answer(
                    {"id": "x", "object": "text_completion", "choices": [text], "kv_transfer_params": kv | first}
                )

            def never_end(self) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                self.close_connection = True
                try:
                    self.wfile.write(b"data: ")
                    for _ in range(ENDLESS >> 16):
                        self.wfile.write(b"x" * (1 << 16))
                except OSError:
                    pass

        self.at = stack.enter_context(serving(Handler, OUR_END))


@dataclass
class Front:
    """A proxy in front of two scripted engines."""

    within: list[str]
    proxy: Proxy
    canary: Scripted
    ids: list[str]

    @property
    def port(self) -> int:
        return int(urlsplit(self.proxy.url).port or 0)

    def check(self) -> None:
        body = {"model": "m", "prompt": "hello", "max_tokens": 9}
        status, text = call(f"{self.proxy.url}/v1/completions", body, timeout_s=20)
        assert status == 200, text
        assert json.loads(text)["choices"][0]["text"] == "as asked: hello"
        assert call(f"{self.proxy.url}/health", timeout_s=20)[0] == 200

    def attack(self, name: str, **given: object) -> Attacker:
        registration = int(self.proxy.registration.rpartition(":")[2])
        given = {"host": OUR_END, "port": self.port, "registration_port": registration, **given}
        return Attacker(self.within, "hostile.py", name, **given)

    def under(self, attacker: Attacker) -> Any:
        deadline = time.monotonic() + BOUND_S
        self.check()
        while attacker.running:
            assert time.monotonic() < deadline, "the attack does not end"
            self.check()
        return attacker.answer()

    def state(self) -> tuple[Any, ...]:
        instances = sorted((i["id"], i["standing"]["state"]) for i in self.proxy.instances())
        return instances, json.loads(call(f"{self.proxy.url}/mode")[1])["mode"]


@pytest.fixture(scope="module")
def front(host: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("front")
    with ExitStack() as stack:
        prefill, decode, canary = (Scripted(stack) for _ in range(3))
        flags = ["--prefill", f"http://{prefill.at}", "--decode", f"http://{decode.at}", "--insecure"]
        proxy = Proxy(folder, flags)
        # Listen on all addresses, because the requests of a browser on the victim's host come from loopback.
        port = free_port()
        proxy.url, proxy.registration = f"http://0.0.0.0:{port}", f"{OUR_END}:{free_port()}"
        stack.callback(proxy.stop)
        proxy.start()
        proxy.url = f"http://{OUR_END}:{port}"
        proxy.wait_ready()
        front = Front(host, proxy, canary, [i["id"] for i in proxy.instances()])
        front.check()
        yield front
        front.check()
        assert proxy.running


@pytest.mark.parametrize("as_seen_from", ["another host", "a browser of this host"])
def test_a_page_or_another_proxy_changes_nothing(front: Front, as_seen_from: str) -> None:
    before = front.state()
    if as_seen_from == "another host":
        attacker = front.attack("changes", ids=front.ids)
    else:
        attacker = Attacker([], "hostile.py", "changes", host="127.0.0.1", port=front.port, ids=front.ids)
    answers = front.under(attacker)
    assert set(answers) == {400, 403} or answers == [403], answers
    assert front.state() == before
    text = {"Content-Type": "text/plain", "Origin": "http://evil.example"}
    given = {"host": OUR_END, "port": front.port}
    assert hostile.status(given, "/v1/completions", text, '{"model": "m", "prompt": "hello"}') == 400


def test_a_registered_address_is_no_request_to_any_path(front: Front) -> None:
    sent = front.under(front.attack("addresses", canary=front.canary.at, rounds=5))
    # The proxy reads what it was sent a moment later.
    deadline = time.monotonic() + BOUND_S
    while front.proxy.metrics().sum("pd_proxy_registration_messages") < sent:
        assert time.monotonic() < deadline, "the proxy does not read the registrations"
        time.sleep(0.05)
    assert front.canary.asked == [], front.canary.asked
    assert not any("evil" in i["id"] for i in front.proxy.instances())


def test_half_sent_bodies_of_one_address_keep_no_other_out(front: Front) -> None:
    attacker = front.attack("halves", connections=1500)
    try:
        assert attacker.line() > 500
        for _ in range(20):
            front.check()
    finally:
        attacker.answer()


def test_an_event_that_never_ends_delays_nobody(front: Front) -> None:
    before = resident(front.proxy.pid)
    attackers = [front.attack("endless") for _ in range(4)]
    for attacker in attackers:
        front.under(attacker)
    assert resident(front.proxy.pid) - before < ENDLESS, "four such events are four times as long"


def resident(pid: int) -> int:
    """Returns the largest amount of memory that a process has used so far."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10
