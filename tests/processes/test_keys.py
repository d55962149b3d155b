"""Tests sidecars that know their peers by keys: KV moves between known peers, and strangers get nothing.

No engine runs: a client at each sidecar takes the place of an engine.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from harness.client import call, post_json
from harness.proxy import Proxy
from harness.sidecar import BINARIES, CHUNK_TOKENS, NO_PUSH, Sidecar, SidecarOptions
from harness.waiting import until
from test_groups import GROUPS, LAYOUT, Pair, hello, keys

from pd_sidecar.client import Client
from pd_sidecar.kv.plan import Plan
from pd_sidecar.sidecar.wire import Ended, Granted

SLOTS = 16
BOUND_S = 60.0

pytestmark = pytest.mark.skipif(NO_PUSH, reason="nothing can be pushed")


@dataclass
class Fleet:
    """The keys of some processes, and the roster that lists them."""

    folder: Path

    def key(self, name: str, program: str = "sidecar") -> str:
        """Makes a key and returns its public part."""
        command: list[str | Path] = [BINARIES / program, "keygen", self.folder / f"{name}.key"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def write(self, members: dict[str, tuple[str, str]]) -> None:
        """Writes the roster. Each key comes with its name and its role."""
        entries = {key: {"name": name, "roles": [role]} for key, (name, role) in members.items()}
        new = self.folder / "roster.new"
        new.write_text(json.dumps(entries))
        new.rename(self.folder / "roster.yaml")

    def settings(self, name: str, auth: str = "require") -> dict[str, object]:
        return {
            "auth": auth,
            "key_file": str(self.folder / f"{name}.key"),
            "roster": str(self.folder / "roster.yaml"),
            "checksum": True,
        }


def port_event(sidecar: Sidecar, event: str) -> float:
    return sidecar.metrics().sum("pd_sidecar_port_events", port="init", event=event)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[Pair, Fleet, dict[str, tuple[str, str]]]]:
    """Yields two sidecars that know each other, and their roster."""
    fleet = Fleet(tmp_path)
    members = {fleet.key(f"{role}-sidecar"): (f"{role}-sidecar", role) for role in ("sender", "receiver")}
    fleet.write(members)
    options = SidecarOptions("receiver", SLOTS * LAYOUT.chunk_bytes, transport="tcp")
    sides = [
        Sidecar(replace(options, role=role, keys=fleet.settings(f"{role}-sidecar")), tmp_path, tmp_path)
        for role in ("sender", "receiver")
    ]
    try:
        for side in sides:
            side.start()
        yield Pair(*sides), fleet, members
    finally:
        for side in sides:
            side.stop()


def refusal(sender: Sidecar, receiver: Sidecar, req: str) -> str | None:
    """Returns the reason with which a request of the sender ends; `None` if the receiver grants slots."""
    prefill = Client.connect(str(sender.socket), hello("prefill", LAYOUT), BOUND_S)
    decode = Client.connect(str(receiver.socket), hello("decode", LAYOUT), BOUND_S)
    plan = Plan(GROUPS, CHUNK_TOKENS, tokens=100, have=0)
    prefill.reserve(req, Pair(sender, receiver).target, keys(plan), tokens=100, upto=100, overlap=False)
    answers: list[Granted | Ended] = []

    def is_answered() -> bool:
        answers.extend(message for message in prefill.wait(0.05) if isinstance(message, (Granted, Ended)))
        return bool(answers)

    until("the request has no answer", is_answered)
    prefill.close()
    decode.close()
    return answers[0].reason if isinstance(answers[0], Ended) else None


def test_known_peers_move_kv_and_a_revoked_key_moves_nothing(
    started: tuple[Pair, Fleet, dict[str, tuple[str, str]]],
) -> None:
    pair, fleet, members = started
    pair.move("r-0", tokens=1000, have=0, slots=SLOTS)
    assert port_event(pair.receiver, "failed_handshakes") == 0
    # The sender's key leaves the roster, without a restart of the receiver.
    fleet.write({key: member for key, member in members.items() if member[1] != "sender"})
    metrics = pair.receiver.metrics
    until("the connection stays", lambda: metrics().sum("pd_sidecar_port_events", event="revoked") > 0)
    assert refusal(pair.sender, pair.receiver, "r-1") is not None
    assert pair.receiver.records()[-1]["req"] == "r-0"
    # The key returns, and KV moves again.
    fleet.write(members)
    until("the sender is not known again", lambda: refusal(pair.sender, pair.receiver, str(time.time_ns())) is None)
    pair.move("r-2", tokens=1000, have=0, slots=SLOTS)


def test_a_stranger_and_a_plain_peer_get_nothing(
    started: tuple[Pair, Fleet, dict[str, tuple[str, str]]], tmp_path: Path
) -> None:
    pair, _, members = started
    own = tmp_path / "stranger"
    own.mkdir()
    alien = Fleet(own)
    # The stranger has a roster of its own, in which it and the receiver are known.
    receiver = next(key for key, (_, role) in members.items() if role == "receiver")
    alien.write({alien.key("sender-sidecar"): ("sender-sidecar", "sender"), receiver: ("receiver-sidecar", "receiver")})
    options = SidecarOptions("sender", SLOTS * LAYOUT.chunk_bytes, transport="tcp")
    plain: dict[str, object] = {"checksum": True}
    for settings, event in (
        (alien.settings("sender-sidecar"), "refused_unknown_key"),
        (plain, "refused_plain"),
    ):
        stranger = Sidecar(replace(options, keys=settings), own, own, name="sender-sidecar")
        try:
            stranger.start()
            assert refusal(stranger, pair.receiver, event) is not None
            until(f"no {event}", lambda: port_event(pair.receiver, event) > 0)  # noqa: B023
        finally:
            stranger.stop()
    assert pair.receiver.records() == []
    pair.move("r-0", tokens=300, have=0, slots=SLOTS)


def acknowledged(sidecar: Sidecar) -> bool:
    return sidecar.status()["proxy"]["acknowledged_ms_ago"] is not None


def test_a_proxy_says_why_it_refuses_a_registration(
    started: tuple[Pair, Fleet, dict[str, tuple[str, str]]], tmp_path: Path
) -> None:
    pair, fleet, members = started
    members[fleet.key("front", "pd-proxy")] = ("front", "proxy")
    fleet.write(members)
    # In the proxy's roster the receiver has another address than the one that it announces.
    entries = {key: {"name": name, "roles": [role]} for key, (name, role) in members.items()}
    wrong = {
        key: {**entry, **({"hosts": ["10.0.0.9"]} if entry["roles"] == ["receiver"] else {})}
        for key, entry in entries.items()
    }
    roster = tmp_path / "proxy-roster.yaml"
    roster.write_text(json.dumps(wrong))
    flags = ["--auth", "require", "--key-file", str(tmp_path / "front.key"), "--roster", str(roster)]
    proxy = Proxy(tmp_path, flags)
    try:
        proxy.start()
        receiver = pair.receiver
        receiver.options = replace(receiver.options, proxy=proxy.registration)
        receiver.restart()
        why = "receiver-sidecar announces 127.0.0.1, which is none of its hosts in the roster; add it there"
        until("the refusal is not told", lambda: why in call(f"{receiver.admin}/ready")[1])
        until("the refusal is not logged", lambda: why in output(receiver))
        # A stranger's call-back does not count as the proxy's acknowledgement.
        status = receiver.status()
        claim = {"proxy": proxy.registration, "id": status["id"], "epoch": status["epoch"]}
        assert post_json(f"{receiver.admin}/registered", claim)["id"] == status["id"]
        assert not acknowledged(receiver)
        # The roster is mended while both run.
        roster.write_text(json.dumps(entries))
        until("the registration is not confirmed", lambda: acknowledged(receiver))
        until("the refusal is still told", lambda: why not in call(f"{receiver.admin}/ready")[1])
        assert [instance["id"] for instance in proxy.instances()] == ["receiver-sidecar"]
    finally:
        proxy.stop()


def test_a_sidecar_needs_only_the_proxys_key(tmp_path: Path) -> None:
    """The rosters of the sidecars list the proxy and themselves. The proxy names the others, and revokes them."""
    fleet = Fleet(tmp_path)
    members = {fleet.key(f"{role}-sidecar"): (f"{role}-sidecar", role) for role in ("sender", "receiver")}
    members[fleet.key("front", "pd-proxy")] = ("front", "proxy")
    fleet.write(members)
    flags = ["--auth", "require", "--key-file", str(tmp_path / "front.key"), "--roster", str(tmp_path / "roster.yaml")]
    proxy = Proxy(tmp_path, flags)
    sides = []
    for role in ("sender", "receiver"):
        name = f"{role}-sidecar"
        own = {key: {"name": n, "roles": [r]} for key, (n, r) in members.items() if n in (name, "front")}
        roster = tmp_path / f"{role}.yaml"
        roster.write_text(json.dumps(own))
        settings = {**fleet.settings(name), "roster": str(roster), "peers_from_proxy": True, "register_ms": 500}
        options = SidecarOptions(role, SLOTS * LAYOUT.chunk_bytes, transport="tcp", proxy=proxy.registration)
        sides.append(Sidecar(replace(options, keys=settings), tmp_path, tmp_path))
    pair = Pair(*sides)
    try:
        for side in sides:
            side.start()
        assert refusal(pair.sender, pair.receiver, "too-early") is not None
        proxy.start()
        for side in sides:
            until("the proxy names nobody", lambda side=side: "has named peers" in output(side))  # type: ignore[misc]
        pair.move("r-0", tokens=1000, have=0, slots=SLOTS)
        # The sender leaves the proxy's roster. The receiver's own roster never had it.
        fleet.write({key: member for key, member in members.items() if member[1] != "sender"})
        metrics = pair.receiver.metrics
        until("the connection stays", lambda: metrics().sum("pd_sidecar_port_events", event="revoked") > 0)
        assert refusal(pair.sender, pair.receiver, "revoked") is not None
        assert pair.receiver.records()[-1]["req"] == "r-0"
    finally:
        for side in sides:
            side.stop()
        proxy.stop()


def output(sidecar: Sidecar) -> str:
    assert sidecar.process is not None
    return sidecar.process.output()


def test_a_proxy_takes_registrations_of_known_sidecars_only(
    started: tuple[Pair, Fleet, dict[str, tuple[str, str]]], tmp_path: Path
) -> None:
    pair, fleet, members = started
    members[fleet.key("front", "pd-proxy")] = ("front", "proxy")
    fleet.write(members)
    flags = ["--auth", "require", "--key-file", str(tmp_path / "front.key"), "--roster", str(tmp_path / "roster.yaml")]
    proxy = Proxy(tmp_path, flags)
    plain = Sidecar(
        SidecarOptions("receiver", SLOTS * LAYOUT.chunk_bytes, proxy=proxy.registration, transport="tcp"),
        tmp_path,
        tmp_path,
        name="plain",
    )
    try:
        proxy.start()
        plain.start()
        for side in (pair.sender, pair.receiver):
            side.options = replace(side.options, proxy=proxy.registration)
            side.restart()
        until("the known sidecars are not registered", lambda: len(proxy.instances()) == 2)
        assert {instance["id"] for instance in proxy.instances()} == {"sender-sidecar", "receiver-sidecar"}
        for side in (pair.sender, pair.receiver):
            until("the proxy confirms nothing", lambda side=side: acknowledged(side))  # type: ignore[misc]
    finally:
        plain.stop()
        proxy.stop()
