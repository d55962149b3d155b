"""Checks the rendered Kubernetes manifests: their schemas, and what the parts of a pod must have in common."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.sidecar import ROOT
from rendered import FOLDERS, KUBERNETES, Manifest, Pod, config_files, environment, manifests, pod, pods, secret_mounts

# The oldest version in which all fields of the manifests exist, for each folder.
VERSIONS = {"overlays/tcp": "1.34", "overlays/store": "1.34"}
OLDEST = "1.30"
SCHEMAS = Path(__file__).parent / "schemas"

GIB = 1 << 30
SIDECAR_DRAIN_S = 10
HOOK_BOUND_S = 5

everywhere = pytest.mark.parametrize("folder", FOLDERS)


@everywhere
def test_core_schemas(folder: str) -> None:
    """Unknown fields, wrong types and missing fields fail: the schemas are the strict ones of Kubernetes itself."""
    validate = pytest.importorskip(
        "kubernetes_validate", reason="no kubernetes-validate: core schemas not checked; run `make venv`"
    ).validate
    version = VERSIONS.get(folder, OLDEST)
    templates = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": each.name}, "template": each.template}
        for each in pods(folder)
    ]
    core = [manifest for manifest in manifests(folder) if not _custom(manifest)]
    assert core and templates
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for manifest in [*core, *templates]:
            validate(manifest, version, strict=True)


@everywhere
def test_custom_schemas(folder: str) -> None:
    """Objects of custom resources have only the fields that our schema of their API has."""
    jsonschema = pytest.importorskip("jsonschema", reason="no jsonschema: custom resources not checked")
    for manifest in filter(_custom, manifests(folder)):
        name = f"{manifest['kind']}-{manifest['apiVersion'].replace('/', '-')}.yaml".lower()
        jsonschema.validate(manifest, yaml.safe_load((SCHEMAS / name).read_text()))


@everywhere
def test_containers_have_no_rights(folder: str) -> None:
    for each in pods(folder):
        assert each.spec["securityContext"]["runAsNonRoot"] is True
        assert each.spec["automountServiceAccountToken"] is False
        for container in each.containers():
            where = f"{each.name}/{container['name']}"
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True, where
            assert rights["allowPrivilegeEscalation"] is False, where
            assert rights["capabilities"] == {"drop": ["ALL"]}, where
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), where
            assert "memory" in container["resources"]["limits"], where


@everywhere
def test_no_service_becomes_a_setting(folder: str) -> None:
    """The services' names begin with `pd-proxy`, so Kubernetes would set `PD_PROXY_PORT` and others in each each."""
    for each in pods(folder):
        assert each.spec["enableServiceLinks"] is False, each.name


@everywhere
def test_only_the_one_node_overlay_shares_the_host(folder: str) -> None:
    for component in ("proxy", "prefill", "decode"):
        spec = pod(folder, component).spec
        shares = {key for key in ("hostIPC", "hostPID", "hostNetwork") if spec.get(key)}
        expected = {"hostIPC", "hostPID"} if folder == "overlays/one-node" and component != "proxy" else set()
        assert shares == expected, component


@everywhere
@pytest.mark.parametrize("component", ["prefill", "decode"])
def test_engine_and_sidecar_meet(folder: str, component: str) -> None:
    """The sidecar is native, both containers see the same socket, in a folder below a shared volume."""
    found = pod(folder, component)
    sidecar, engine = found.container("sidecar"), found.container("engine")
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar in found.spec["initContainers"]
    config = _config(folder, component)
    socket = Path(config["sidecar"]["socket"])
    assert {"name": "PD_SIDECAR_SOCKET", "value": str(socket)} in engine["env"]
    volumes = {volume["name"]: volume for volume in found.spec["volumes"]}
    for container in (sidecar, engine):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        # The volume itself has mode 0777, which both ends refuse.
        assert "emptyDir" in volumes[mounts[str(socket.parent.parent)]]
        assert "configMap" in volumes[mounts["/etc/pd-sidecar"]]
    (port,) = (port["containerPort"] for port in engine["ports"])
    assert f"--port={port}" in engine["args"]
    assert {"name": "PD_SIDECAR_ENGINE_URL", "value": f"http://$(POD_IP):{port}"} in sidecar["env"]


@everywhere
@pytest.mark.parametrize("component", ["prefill", "decode"])
def test_the_buffer_fits_into_the_memory_limit(folder: str, component: str) -> None:
    """Without room for the buffer the kernel would kill the sidecar at the first large transfer."""
    limit = pod(folder, component).container("sidecar")["resources"]["limits"]["memory"]
    assert _bytes(limit) >= _config(folder, component)["pd_buffer_size"] + GIB // 2


@everywhere
def test_grace_periods_cover_the_drains(folder: str) -> None:
    """Otherwise the kubelet would kill a process that still serves requests."""
    proxy = pod(folder, "proxy")
    container = proxy.container("proxy")
    drain = _seconds(container["args"], r"--drain-timeout=(\d+)s")
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert proxy.spec["terminationGracePeriodSeconds"] >= sleep + drain + 5
    for component in ("prefill", "decode"):
        found = pod(folder, component)
        engine = _seconds(found.container("engine")["args"], r"--shutdown-timeout=(\d+)")
        # An engine ends only after the proxy's requests.
        assert engine >= drain
        assert "drain_timeout_ms" not in _config(folder, component)["sidecar"]
        assert found.spec["terminationGracePeriodSeconds"] >= HOOK_BOUND_S + engine + SIDECAR_DRAIN_S + 10


@everywhere
def test_each_pod_has_only_its_own_key(folder: str) -> None:
    """All channels need keys, and no pod can act as another pod."""
    for component in ("proxy", "prefill", "decode"):
        found = pod(folder, component)
        for container in found.containers():
            seen = {name: {item["key"] for item in items} for name, items in secret_mounts(found, container).values()}
            keys = seen.get("pd-keys", set())
            assert keys == (set() if container["name"] == "engine" else {f"pd-{component}.key", "roster.yaml"})
            http = {"proxy": {"admin", "api"}, "engine": {"admin"}, "sidecar": set()}[container["name"]]
            assert seen.get("pd-proxy", set()) == http
            # The pod may read root's files, by its group, and the container writes none of them.
            assert found.spec["securityContext"]["fsGroup"] == 10001
    for component in ("prefill", "decode"):
        ours = _config(folder, component)["sidecar"]
        assert ours["auth"] == "require" and "insecure" not in ours
    arguments = pod(folder, "proxy").container("proxy")["args"]
    assert "--auth=require" in arguments and "--insecure" not in arguments


def test_the_nodes_gpus_are_not_shared_by_chance() -> None:
    """Over several nodes, engine and sidecar share the claim of one GPU. On one node each engine has its own GPU, and
    its sidecar has its buffer on the same GPU and sees both.
    """
    for component, gpu in (("prefill", "0"), ("decode", "1")):
        several = pod("overlays/tcp", component)
        (claim,) = several.spec["resourceClaims"]
        for container in several.containers():
            assert container["resources"]["claims"] == [{"name": claim["name"]}]
        assert several.spec["shareProcessNamespace"] is True
        one = pod("overlays/one-node", component)
        assert environment(one.container("engine"))["CUDA_VISIBLE_DEVICES"] == gpu
        sidecar = environment(one.container("sidecar"))
        assert sidecar["LMCACHE_PD_BUFFER_DEVICE"] == f"cuda:{gpu}"
        assert "CUDA_VISIBLE_DEVICES" not in sidecar


@everywhere
def test_sidecars_reach_a_proxy_that_is_not_ready(folder: str) -> None:
    """A proxy is ready only after a registration. Through a usual service no registration could reach it."""
    services = {m["metadata"]["name"]: m["spec"] for m in manifests(folder) if m["kind"] == "Service"}
    proxy = pod(folder, "proxy")
    for component in ("prefill", "decode"):
        config = _config(folder, component)
        service = services[config["pd_proxy_host"]]
        assert service["publishNotReadyAddresses"] is True
        assert [port["port"] for port in service["ports"]] == [config["pd_proxy_port"]]
        assert service["selector"].items() <= proxy.labels.items()


@everywhere
def test_policies_admit_what_the_parts_need(folder: str) -> None:
    proxy, prefill, decode = (pod(folder, component) for component in ("proxy", "prefill", "decode"))
    needed = {(prefill.name, 7500): (proxy, prefill), (decode.name, 7500): (proxy, decode)}
    for engine in (prefill, decode):
        ports = [p["containerPort"] for name in ("sidecar", "engine") for p in engine.container(name)["ports"]]
        peers = {p: (engine, prefill if p in (7300, 7400, 7450) else proxy) for p in ports}
        needed |= {(engine.name, number): ends for number, ends in peers.items()}
    for (_, number), (target, source) in needed.items():
        assert _admits(folder, target, source.labels, number), f"{source.name} to {target.name}:{number}"
        assert not _admits(folder, target, {"app": "stranger"}, number), f"stranger to {target.name}:{number}"
    assert _admits(folder, proxy, {"app": "stranger"}, 8000)


def test_only_engines_reach_the_store() -> None:
    """The store's protocol has no keys, so the policy is what keeps strangers away."""
    folder = "overlays/store"
    store, *engines = (pod(folder, component) for component in ("store", "prefill", "decode"))
    ports = {each["name"]: each["containerPort"] for each in store.container("store")["ports"]}
    for engine in engines:
        assert _admits(folder, store, engine.labels, ports["lm"])
        assert not _admits(folder, store, engine.labels, ports["admin"])
    assert not _admits(folder, store, {"app": "stranger"}, ports["lm"])


@everywhere
def test_a_disruption_takes_one_engine_at_a_time(folder: str) -> None:
    budgets = [m["spec"] for m in manifests(folder) if m["kind"] == "PodDisruptionBudget"]
    for component in ("prefill", "decode"):
        labels = pod(folder, component).labels
        (budget,) = (b for b in budgets if b["selector"]["matchLabels"].items() <= labels.items())
        assert budget["maxUnavailable"] == 1


def test_the_example_of_the_page(tmp_path: Path) -> None:
    """docs/deploy.md shows a folder with a user's settings. The settings reach the objects."""
    page = (ROOT / "docs" / "deploy.md").read_text()
    (example,) = re.findall(r"```yaml\n# my-pd/kustomization.yaml\n(.*?)```", page, re.DOTALL)
    deploy = os.path.relpath(KUBERNETES.parent, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(example.replace("../deploy", deploy))
    objects = {(m["kind"], m["metadata"]["name"]): m for m in manifests(str(tmp_path))}
    assert objects["ConfigMap", "pd-model"]["data"] == {"MODEL": "Qwen/Qwen3-8B"}
    assert objects["Deployment", "pd-prefill"]["spec"]["replicas"] == 2
    for found in pods(str(tmp_path)):
        for container in found.containers():
            assert container["image"] == "REGISTRY/pd-sidecar-vllm:0.1.0"


def _custom(manifest: Manifest) -> bool:
    return ".x-k8s.io/" in manifest["apiVersion"]


def _config(folder: str, component: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(config_files(folder)[f"{component}-sidecar.yaml"])
    return config


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", text).groups()  # type: ignore[union-attr]
    return int(number) << (20 if unit == "Mi" else 30)


def _seconds(arguments: list[str], pattern: str) -> int:
    (found,) = (match for argument in arguments if (match := re.fullmatch(pattern, argument)))
    return int(found[1])


def _admits(folder: str, target: Pod, source: dict[str, str], port: int) -> bool:
    """Returns true if a policy admits connections of a pod of this namespace. Without a policy it is open."""
    policies = [
        m["spec"]
        for m in manifests(folder)
        if m["kind"] == "NetworkPolicy" and m["spec"]["podSelector"]["matchLabels"].items() <= target.labels.items()
    ]
    return not policies or any(
        any(entry["port"] == port for entry in rule["ports"])
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
