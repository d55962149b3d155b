"""Tests a host that stands still for some seconds, such as a virtual machine that is moved to another host."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from harness.proxy import Proxy
from harness.sidecar import Sidecar, SidecarOptions
from harness.waiting import until

# An instance is gone after three missed heartbeats.
HEARTBEAT_MS = 500
STANDSTILL_S = 4.0


@pytest.mark.parametrize("who", ["the proxy", "both"])
def test_instances_are_not_lost(who: str, tmp_path: Path) -> None:
    proxy = Proxy(tmp_path)
    proxy.start()
    try:
        options = SidecarOptions(
            "receiver", 1 << 20, transport="tcp", proxy=proxy.registration, keys={"register_ms": HEARTBEAT_MS}
        )
        sidecar = Sidecar(options, tmp_path, tmp_path)
        sidecar.start()
        try:
            until("the sidecar has not registered", proxy.instances)
            assert proxy.process is not None and sidecar.process is not None
            processes = [proxy.process, sidecar.process][: 1 if who == "the proxy" else 2]
            for process in processes:
                process.signal(signal.SIGSTOP)
            time.sleep(STANDSTILL_S)
            # The proxy runs first, so it has not heard the sidecar when it runs.
            for process in processes:
                process.signal(signal.SIGCONT)
            output = proxy.process.output
            until("the proxy has not seen that it stood still", lambda: "the proxy did not run" in output())
            heard = heartbeats(proxy)
            until("the proxy hears no heartbeats", lambda: heartbeats(proxy) >= heard + 2)
            assert "gone: " not in output()
            assert len(proxy.instances()) == 1
        finally:
            sidecar.stop()
    finally:
        proxy.stop()


def heartbeats(proxy: Proxy) -> float:
    return proxy.metrics().sum("pd_proxy_registration_messages_total", kind="register")
