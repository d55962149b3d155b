"""Checks which pods reach which ports in the rendered Kubernetes manifests: services and network policies."""

from __future__ import annotations

import pytest
from rendered import FOLDERS, OTHER_ROUTERS, WITH_PROXY, Pod, manifests, pod, port, settings

everywhere = pytest.mark.parametrize("folder", FOLDERS)
with_proxy = pytest.mark.parametrize("folder", WITH_PROXY)


@with_proxy
def test_sidecars_reach_a_proxy_that_is_not_ready(folder: str) -> None:
    """A proxy is ready only after a registration. Through a usual service no registration could reach it."""
    services = {m["metadata"]["name"]: m["spec"] for m in manifests(folder) if m["kind"] == "Service"}
    proxy = pod(folder, "proxy")
    for component in ("prefill", "decode"):
        name, _, number = settings(folder, component)["sidecar.proxy"].removeprefix("etcd at ").partition(":")
        service, target = services[name], proxy
        assert [port["port"] for port in service["ports"]] == [int(number)]
        if name == "pd-metadata":
            # The sidecars find the address of the proxy's pod there, not a service.
            target = pod(folder, "metadata")
            assert "--registration=$(POD_IP):7500" in proxy.container("proxy")["args"]
            assert _admits(folder, target, proxy.labels, int(number))
            assert not _admits(folder, target, {"app": "stranger"}, int(number))
        else:
            assert service["publishNotReadyAddresses"] is True
        assert service["selector"].items() <= target.labels.items()


@everywhere
def test_policies_admit_what_the_parts_need(folder: str) -> None:
    """The sidecars reach each other, the proxy reaches engines and sidecars, and a stranger reaches none of them."""
    prefill, decode = (pod(folder, component) for component in ("prefill", "decode"))
    receiver = {port(decode.container("sidecar"), name) for name in ("init", "alloc", "data")}
    fetch = {p["containerPort"] for p in prefill.container("sidecar")["ports"] if p["name"] == "fetch"}
    needed = [(decode, number, prefill) for number in receiver] + [(prefill, number, decode) for number in fetch]
    if folder in OTHER_ROUTERS:
        assert fetch
    else:
        proxy = pod(folder, "proxy")
        needed += [(proxy, 7500, prefill), (proxy, 7500, decode)]
        for engine in (prefill, decode):
            ports = (port(engine.container("engine"), "http"), port(engine.container("sidecar"), "admin"))
            needed += [(engine, number, proxy) for number in ports]
        assert _admits(folder, proxy, {"app": "stranger"}, 8000)
    for target, number, source in needed:
        assert _admits(folder, target, source.labels, number), f"{source.name} to {target.name}:{number}"
        assert not _admits(folder, target, {"app": "stranger"}, number), f"stranger to {target.name}:{number}"


def test_requests_reach_the_engines_of_other_routers() -> None:
    """llm-d's router sends to one port of all pods; its sidecar is at that port of a decode pod. Dynamo's frontend and
    workers reach each other at any port, and nobody else reaches the workers.
    """
    prefill, decode = (pod("overlays/llm-d", component) for component in ("prefill", "decode"))
    routing = decode.container("routing-proxy")
    (number,) = {port(prefill.container("engine"), "http"), port(routing, "routing")}
    assert f"--port={number}" in routing["args"] and "--kv-connector=nixlv2" in routing["args"]
    assert f"--model-server-port={port(decode.container('engine'), 'http')}" in routing["args"]
    for found, role in ((prefill, "prefill"), (decode, "decode")):
        assert found.labels["llm-d.ai/role"] == role and found.labels["llm-d.ai/guide"] == "pd-disaggregation"
        assert _admits("overlays/llm-d", found, {"app": "gateway"}, number)
    frontend, *workers = (pod("overlays/dynamo", each) for each in ("frontend", "prefill", "decode"))
    for worker in workers:
        assert _admits("overlays/dynamo", worker, frontend.labels, 34567)
        assert _admits("overlays/dynamo", frontend, worker.labels, 34567)
        assert not _admits("overlays/dynamo", worker, {"app": "stranger"}, 34567)
    assert _admits("overlays/dynamo", frontend, {"app": "stranger"}, port(frontend.container("frontend"), "http"))


def test_only_engines_reach_the_store() -> None:
    """The store's protocol has no keys, so the policy is what keeps strangers away."""
    folder = "overlays/store"
    store, *engines = (pod(folder, component) for component in ("store", "prefill", "decode"))
    ports = {each["name"]: each["containerPort"] for each in store.container("store")["ports"]}
    for engine in engines:
        assert _admits(folder, store, engine.labels, ports["lm"])
        assert not _admits(folder, store, engine.labels, ports["admin"])
    assert not _admits(folder, store, {"app": "stranger"}, ports["lm"])


def _admits(folder: str, target: Pod, source: dict[str, str], port: int) -> bool:
    """Returns true if a policy admits connections of a pod of this namespace. Without a policy it is open."""
    policies = [
        m["spec"]
        for m in manifests(folder)
        if m["kind"] == "NetworkPolicy" and m["spec"]["podSelector"]["matchLabels"].items() <= target.labels.items()
    ]
    return not policies or any(
        any(entry["port"] == port for entry in rule.get("ports", [{"port": port}]))
        and (
            "from" not in rule
            or any(
                peer.get("podSelector", {"matchLabels": {"": ""}})["matchLabels"].items() <= source.items()
                for peer in rule["from"]
            )
        )
        for policy in policies
        for rule in policy["ingress"]
    )
