"""Settings of the sidecar that an engine with `kv_both` starts if its options and its environment name no sidecar."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pd_sidecar.client import SOCKET_VARIABLE, default_socket
from pd_sidecar.options import lmcache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HOST_VARIABLE = "VLLM_NIXL_SIDE_CHANNEL_HOST"
"""The variable of vLLM that names the address at which other instances reach this instance's KV."""
INSECURE_VARIABLE = "PD_SIDECAR_INSECURE"
DEVICE_VARIABLE = "LMCACHE_PD_BUFFER_DEVICE"
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
LOOPBACK = "127.0.0.1"
SPAWNED = "alone"
"""The value of `PD_SIDECAR_SPAWNED` for a sidecar that removes all its files when it ends: the engine has a new id at
each start, so no later sidecar uses these files.
"""
BUFFER_SIZE = "1GiB"
"""The size of each of the two buffers of a rank."""


def is_wanted(extra: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> bool:
    """Returns true if neither the connector's options nor the environment name a sidecar or its configuration."""
    named = {"sidecar", "sidecar_arguments", "sender_socket", "receiver_socket"} & extra.keys()
    return not named and not environ.get(SOCKET_VARIABLE) and not environ.get(lmcache.FILE_VARIABLE)


def socket_of(role: str, engine_id: str) -> str:
    """Returns the socket of a sidecar that this engine starts. Engines of one host have different ids, so their
    sidecars have different sockets. `PD_SIDECAR_SOCKET` has precedence.
    """
    path = default_socket(role)
    if not engine_id or os.environ.get(SOCKET_VARIABLE):
        return path
    digest = hashlib.sha256(engine_id.encode()).hexdigest()[:12]
    return str(Path(path).with_name(f"{role}-{digest}.sock"))


def problem(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns the reason why the sidecar would refuse to listen at the host of the environment; `None` if it would
    not. Without this check the engine would start such a sidecar again and again.
    """
    host = _host(environ)
    if _is_loopback(host) or environ.get(INSECURE_VARIABLE):
        return None
    return (
        f"{HOST_VARIABLE}={host} lets other machines reach the ports of this engine's sidecar, and peers are not "
        f"authenticated yet: set {INSECURE_VARIABLE}=on to allow this, or remove {HOST_VARIABLE}"
    )


def variables(
    ranks: int, device: str, uuid: Callable[[int], str], environ: Mapping[str, str] = os.environ
) -> dict[str, str | None]:
    """Returns the environment variables that configure the sidecar, with ports that are free now; `None` removes a
    variable. Variables that the environment sets already are left out.

    `device` is the type of the engine's device, as in PyTorch. `uuid` returns the UUID of the GPU of a rank.
    """
    host = _host(environ)
    ports = [str(port) for port in _free_ports(host, 2 * ranks)]
    values = {
        "LMCACHE_PD_PEER_HOST": host,
        "LMCACHE_PD_PEER_INIT_PORT": ",".join(ports[:ranks]),
        "LMCACHE_PD_PEER_ALLOC_PORT": ",".join(ports[ranks:]),
        "LMCACHE_PD_BUFFER_SIZE": BUFFER_SIZE,
        DEVICE_VARIABLE: _buffer_device(ranks, device, uuid),
        "PD_SIDECAR_FETCH_PORT": "0",
        "PD_SIDECAR_ADMIN": f"{LOOPBACK}:0",
    }
    found: dict[str, str | None] = {name: value for name, value in values.items() if not environ.get(name)}
    if (found.get(DEVICE_VARIABLE) or "").startswith("cuda:"):
        # An engine sees only its own GPUs. A sidecar must see the GPU of the other side, too, to copy into it. A UUID
        # names the same GPU whichever GPUs are visible.
        found[VISIBLE_VARIABLE] = None
    return found


def _buffer_device(ranks: int, device: str, uuid: Callable[[int], str]) -> str:
    if device != "cuda":
        return "cpu"
    try:
        return ",".join(f"cuda:{uuid(rank)}" for rank in range(ranks))
    except Exception:  # noqa: BLE001 - vLLM's ways to find a UUID fail in many ways, for example without NVML
        return "cuda"


def _host(environ: Mapping[str, str]) -> str:
    return environ.get(HOST_VARIABLE) or LOOPBACK


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _free_ports(host: str, count: int) -> list[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        # All sockets are open at the same time, so that no two have the same port.
        sockets = [stack.enter_context(socket.socket(family)) for _ in range(count)]
        for each in sockets:
            each.bind((host, 0))
        return [each.getsockname()[1] for each in sockets]
