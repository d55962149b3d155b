"""Tests an unchanged `mooncake.json` of Mooncake.

Sidecars take their ports from the URLs in this file, find the proxy through the file's metadata server, and set UCX's
variables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from harness.drop_in.bare import BareReceiver, BareSender
from harness.drop_in.chunks import Prompt
from harness.drop_in.metadata_servers import etcd, redis
from harness.logs import LOGS
from harness.ports import free_ports
from harness.proxy import Proxy
from harness.waiting import until

from pd_sidecar.sidecar.wire import Target

Side = TypeVar("Side", BareSender, BareReceiver)


def base_port(apart: int) -> int:
    """Returns a base port for the prefill side. The ports that follow from it are free, and so are the decode side's
    ports, whose numbers are higher by `apart`.
    """
    return free_ports(tuple(first + offset for first in (0, apart) for offset in (0, 9, 10, 49)))


def bare(kind: type[Side], file: Path, url_port: int) -> Side:
    """Starts a sidecar with only a role and Mooncake's file."""
    folder = file.parent / kind.role
    folder.mkdir()
    env = {"MOONCAKE_CONFIG_PATH": str(file), "LMCACHE_PD_BUFFER_SIZE": "32MiB"}
    return kind(f"mooncake-{kind.role}", ["--role", kind.role], f"127.0.0.1:{url_port + 49}", folder, env)


@pytest.mark.parametrize(("backend", "server"), [("etcd", etcd), ("redis", redis)])
@pytest.mark.parametrize("apart", [50, 100])
def test_the_file_is_enough(tmp_path: Path, backend: str, server: Callable[..., Iterator[str]], apart: int) -> None:
    prefill = base_port(apart)
    decode = prefill + apart
    proxies = [Proxy(LOGS), Proxy(LOGS)]
    with server(tmp_path) as address:  # type: ignore[attr-defined]
        file = tmp_path / "mooncake.json"
        values = {
            "prefill_url": f"127.0.0.1:{prefill}", "decode_url": f"127.0.0.1:{decode}", "metadata_server": address,
            "metadata_backend": backend, "protocol": "tcp", "device_name": "",
        }  # fmt: skip
        file.write_text(json.dumps(values))
        receiver, sender = bare(BareReceiver, file, decode), bare(BareSender, file, prefill)
        receiver.target = Target("127.0.0.1", decode + 9, decode + 10)
        try:
            for proxy in proxies:
                # Both sidecars find a proxy that starts after them, and then a second proxy in its place.
                proxy._flags = ["--mooncake", str(file)]
                proxy.start()
                until("both sidecars are not at the proxy", lambda proxy=proxy: len(registered(proxy)) == 2)  # type: ignore[misc]
                assert registered(proxy) == {"prefill": [], "decode": [decode + 9]}
                if proxy is proxies[0]:
                    proxy.stop()
            prompt = Prompt.of_chunks(5, last=9)
            put = sender.put("mooncake", receiver.target, prompt)
            assert (put.written, put.error) == (5, None)
            assert receiver.get("mooncake", prompt, written=False) == prompt.sums
            for side in (sender, receiver):
                assert side.environ()["UCX_TLS"] == "sm,self,cuda"
                assert "UCX_NET_DEVICES" not in side.environ()
        finally:
            sender.stop()
            receiver.stop()
            proxies[1].stop()


def registered(proxy: Proxy) -> dict[str, list[int]]:
    return {str(i["role"]): list(i["init_ports"]) for i in proxy.instances()}
