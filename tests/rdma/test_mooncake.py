"""Runs an unchanged `mooncake.json` with `"protocol": "rdma"` over real verbs, with a metadata server and the proxy."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from harness.drop_in.bare import BareReceiver, BareSender
from harness.drop_in.chunks import TOKEN_BYTES, Prompt
from harness.drop_in.metadata_servers import etcd
from harness.logs import LOGS
from harness.ports import free_ports
from harness.proxy import Proxy

from pd_sidecar.sidecar.wire import Target
from rdma.devices import counted
from rdma.sides import OTHER_HOST

APART = 100
Side = TypeVar("Side", BareSender, BareReceiver)


@pytest.mark.parametrize(
    ("device_name", "devices"), [("rxe0", "rxe0:1"), ("rxe0,rxe1", "rxe0:1,rxe1:1")], ids=["one", "two"]
)
def test_the_file_is_enough(tmp_path: Path, device_name: str, devices: str) -> None:
    """The sender runs as if on another host, because Mooncake's `rdma` permits shared memory within a host, too."""
    prefill = free_ports(tuple(first + offset for first in (0, APART) for offset in (0, 9, 10, 49)))
    decode = prefill + APART
    with etcd(tmp_path) as address:
        file = tmp_path / "mooncake.json"
        values = {
            "prefill_url": f"127.0.0.1:{prefill}", "decode_url": f"127.0.0.1:{decode}", "metadata_server": address,
            "metadata_backend": "etcd", "protocol": "rdma", "device_name": device_name,
        }  # fmt: skip
        file.write_text(json.dumps(values))
        proxy = Proxy(LOGS, ["--mooncake", str(file)])
        receiver = bare(BareReceiver, file, decode)
        sender = bare(BareSender, file, prefill, OTHER_HOST)
        receiver.target = Target("127.0.0.1", decode + 9, decode + 10)
        try:
            proxy.start()
            deadline = time.monotonic() + 60
            while len(proxy.instances()) < 2:
                assert time.monotonic() < deadline, "both sidecars at the proxy"
                time.sleep(0.1)
            prompt = Prompt.of_chunks(40, last=9)
            with counted() as sent:
                put = sender.put("mooncake", receiver.target, prompt)
                assert (put.written, put.error) == (40, None)
                assert receiver.get("mooncake", prompt, written=False) == prompt.sums
            print(f"\n{device_name}: {prompt.tokens * TOKEN_BYTES} bytes; {sent}")
            assert sent.carries(prompt.tokens * TOKEN_BYTES), "the bytes did not go by verbs"
            environ = receiver.environ()
            assert (environ["UCX_TLS"], environ["UCX_NET_DEVICES"]) == ("ib,sm,self,cuda", devices)
        finally:
            sender.stop()
            receiver.stop()
            proxy.stop()


def bare(kind: type[Side], file: Path, url_port: int, within: Sequence[str] = ()) -> Side:
    """Starts a sidecar with only a role and Mooncake's file."""
    folder = file.parent / kind.role
    folder.mkdir()
    env = {"MOONCAKE_CONFIG_PATH": str(file), "LMCACHE_PD_BUFFER_SIZE": "32MiB"}
    return kind(f"rdma-{kind.role}", ["--role", kind.role], f"127.0.0.1:{url_port + 49}", folder, env, within)
