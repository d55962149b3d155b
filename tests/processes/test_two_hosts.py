"""Kills a sender on another host in the middle of a push. Only its successor can prove that the sender is dead.

The other host is a network namespace and a PID namespace of this host. So the receiver can neither watch the sender's
process nor share memory with it. The transport is NIXL over TCP between the two hosts. No engine runs.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from harness.ports import free_port, network
from harness.sidecar import CHUNK_TOKENS, NO_PUSH, Sidecar, SidecarOptions
from test_strangers import BOUND_S, LAYOUT, Sides, content, hello, keys

from pd_sidecar.client import Client
from pd_sidecar.sidecar.wire import Granted

# Each worker has a network of its own: several files that simulate two hosts run at the same time.
NETWORK = network()
OUR_END, ITS_END = f"{NETWORK}.1", f"{NETWORK}.2"

# The value of `fence_ms` in these tests. A network that fails must be back within this time.
FENCE_S = 4.0

SLOTS = 8


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@contextmanager
def other_host() -> Iterator[list[str]]:
    """Yields the first words of a command that runs on the other host, at `ITS_END`. This host is at `OUR_END`."""
    name = f"pd-{os.getpid()}"
    ours, its = f"pda{os.getpid()}", f"pdb{os.getpid()}"
    if not (
        ip("netns", "add", name)
        and ip("link", "add", ours, "type", "veth", "peer", "name", its, "netns", name)
        and ip("addr", "add", f"{OUR_END}/24", "dev", ours)
        and ip("link", "set", ours, "up")
        and ip("-n", name, "addr", "add", f"{ITS_END}/24", "dev", its)
        and ip("-n", name, "link", "set", its, "up")
        and ip("-n", name, "link", "set", "lo", "up")
    ):
        ip("netns", "del", name)
        pytest.skip("this user may not make network namespaces")
    try:
        yield ["ip", "netns", "exec", name, "unshare", "--pid", "--fork", "--kill-child=SIGKILL"]
    finally:
        ip("netns", "del", name)


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[Sides]:
    if NO_PUSH:
        pytest.skip("nothing can be pushed")
    with other_host() as within:
        options = SidecarOptions(
            "receiver",
            SLOTS * LAYOUT.chunk_bytes,
            transport="nixl",
            flags=["--insecure"],
            env={"UCX_TLS": "tcp", "UCX_NET_DEVICES": f"pda{os.getpid()}"},
            keys={"nixl_over_tcp": "trusted", "fence_ms": int(FENCE_S * 1000), "park_ms": 3000},
        )
        receiver = Sidecar(options, tmp_path, tmp_path)
        receiver.host = OUR_END
        sender = another(receiver, within, "sender", tmp_path)
        try:
            receiver.start()
            sender.start()
            decode = Client.connect(str(receiver.socket), hello("decode"), BOUND_S)
            yield Sides(sender, receiver, Client.connect(str(sender.socket), hello("prefill"), BOUND_S), decode)
        finally:
            end(sender)
            receiver.stop()


def another(receiver: Sidecar, within: list[str], name: str, folder: Path) -> Sidecar:
    """Returns a sender on the other host. All these senders have the same id."""
    env = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": f"pdb{os.getpid()}"}
    options = replace(
        receiver.options, role="sender", env=env, within=within, keys={"id": "prefill", "nixl_over_tcp": "trusted"}
    )
    sender = Sidecar(options, folder, folder, name=name)
    sender.admin = f"http://{ITS_END}:{free_port()}"
    return sender


def end(sender: Sidecar) -> None:
    """Kills the sender, because SIGTERM would not reach it inside the namespaces."""
    if sender.process is not None:
        sender.kill()


def dies_in_the_middle(sides: Sides, req: str, chunks: int) -> None:
    """Kills the sender after it was granted slots and before it has written into them."""
    tokens = chunks * CHUNK_TOKENS
    sides.decode.await_(req, keys(req, chunks), tokens=tokens, have_tokens=0, deadline_ms=60_000)
    sides.prefill.reserve(req, sides.target, keys(req, chunks), tokens=tokens, upto=tokens)
    deadline = time.monotonic() + BOUND_S
    while not any(isinstance(m, Granted) and m.chunks for m in sides.prefill.wait(0.02)):
        assert time.monotonic() < deadline
    assert sides.receiver.slots()[1] == chunks
    sides.sender.kill()
    sides.prefill.close()
    while sides.receiver.slots()[2] != chunks:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_its_successor_vouches_for_a_dead_sender(sides: Sides) -> None:
    sides.check()
    dies_in_the_middle(sides, "first", 2)
    time.sleep(1.25 * FENCE_S)
    assert sides.receiver.slots() == (SLOTS - 2, 0, 2), "it may live: nobody has said otherwise"
    began = time.monotonic()
    sides.sender.start()
    sides.prefill = Client.connect(str(sides.sender.socket), hello("prefill"), BOUND_S)
    sides.check()
    held = sides.receiver.slots()[2]
    # On a busy machine the check may have taken longer than the fence.
    assert held == 2 or time.monotonic() - began > FENCE_S, "its last writes may still be under way"
    sides.receiver.wait_empty(BOUND_S)
    assert time.monotonic() - began > FENCE_S
    sides.check()


def test_one_that_left_too_much_is_served_again(sides: Sides) -> None:
    dies_in_the_middle(sides, "much", SLOTS - 2)
    sides.sender.start()
    sides.prefill = Client.connect(str(sides.sender.socket), hello("prefill"), BOUND_S)
    req = "refused"
    refused, _ = sides.push(req, keys(req), keys(req), CHUNK_TOKENS + 7)
    assert refused == "quarantined"
    sides.receiver.wait_empty(BOUND_S)
    sides.check()


def test_another_sender_of_the_same_name_vouches_for_nobody(sides: Sides, tmp_path: Path) -> None:
    dies_in_the_middle(sides, "first", 2)
    namesake = another(sides.receiver, sides.sender.options.within, "namesake", tmp_path)
    own = sides.sender
    try:
        namesake.start()
        sides.sender, sides.prefill = namesake, Client.connect(str(namesake.socket), hello("prefill"), BOUND_S)
        sides.check()
        time.sleep(1.25 * FENCE_S)
        sides.check()
        # The receiver frees the slots of the check a moment after its end, but not those of the dead sender.
        deadline = time.monotonic() + BOUND_S
        while sides.receiver.slots() != (SLOTS - 2, 0, 2):
            assert time.monotonic() < deadline, sides.receiver.slots()
            time.sleep(0.02)
    finally:
        end(namesake)
        sides.sender = own


def test_what_the_kernel_still_sends_for_a_dead_sender_finds_its_slots_in_quarantine(sides: Sides) -> None:
    """Cuts the network in the middle of a write, kills the sender, and then restores the network."""
    sides.check()
    req, tokens = "late", CHUNK_TOKENS
    sides.decode.await_(req, keys(req, 1), tokens=tokens, have_tokens=0, deadline_ms=60_000)
    sides.prefill.reserve(req, sides.target, keys(req, 1), tokens=tokens, upto=tokens)
    deadline = time.monotonic() + BOUND_S
    granted = None
    while granted is None:
        assert time.monotonic() < deadline
        granted = next((m for m in sides.prefill.wait(0.02) if isinstance(m, Granted) and m.chunks), None)
    sides.prefill.slot(granted.slots[0])[:] = content(req, 0)
    assert ip("link", "set", f"pda{os.getpid()}", "down")
    sides.prefill.staged(req, [0])
    # The kernel sends on for a dead process only what the process has written into its socket before.
    while (written := unsent(sides.sender.options.within)) < LAYOUT.chunk_bytes:
        assert time.monotonic() < deadline, f"the sender has written {written} bytes"
        time.sleep(0.02)
    sides.sender.kill()
    sides.prefill.close()
    killed = time.monotonic()
    assert not landed(sides, req), "nothing has come through"
    time.sleep(1.5)
    assert ip("link", "set", f"pda{os.getpid()}", "up")
    sides.sender.start()
    sides.prefill = Client.connect(str(sides.sender.socket), hello("prefill"), BOUND_S)
    while not landed(sides, req):
        assert time.monotonic() < deadline, "the kernel has given up: nothing was shown"
        time.sleep(0.01)
    assert sides.receiver.slots()[2] == 1, f"after {time.monotonic() - killed:.1f} s"
    sides.check()
    sides.receiver.wait_empty(BOUND_S)


def unsent(within: list[str]) -> int:
    """Returns the most bytes in one socket of the other host that this host has not confirmed."""
    # The first four words enter the network of the other host.
    shown = subprocess.run([*within[:4], "cat", "/proc/net/tcp"], capture_output=True, text=True, check=True).stdout
    return max((int(line.split()[4].partition(":")[0], 16) for line in shown.splitlines()[1:]), default=0)


def landed(sides: Sides, req: str) -> bool:
    return any(bytes(sides.decode.slot(slot)) == content(req, 0) for slot in range(SLOTS))
