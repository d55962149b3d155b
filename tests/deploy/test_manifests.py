"""Checks the rendered Kubernetes manifests: their schemas, and what the parts of a pod must have in common."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import pytest
import yaml
from harness.sidecar import ROOT
from rendered import (
    FOLDERS,
    KUBERNETES,
    POD_IP,
    WITH_PROXY,
    Manifest,
    components,
    environment,
    manifests,
    pod,
    pods,
    port,
    secret_mounts,
    settings,
)

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


def test_profiles_inject_what_the_roles_had() -> None:
    """With the profiles each pod is the pod of the overlay without profiles."""
    injected, plain = (pods(f"overlays/{name}") for name in ("engineruntime", "rolebasedgroup"))
    for ours, theirs in zip(injected, plain, strict=True):
        assert {volume["name"]: volume for volume in ours.spec["volumes"]} == {
            volume["name"]: volume for volume in theirs.spec["volumes"]
        }
        assert ours.containers() == theirs.containers()
    runtimes = [
        role.get("engineRuntimes")
        for manifest in manifests("overlays/engineruntime")
        if manifest["kind"] == "RoleBasedGroup"
        for role in manifest["spec"]["roles"]
    ]
    assert runtimes == [None, [{"profileName": "pd-sidecar-prefill"}], [{"profileName": "pd-sidecar-decode"}]]


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
    for component in components(folder):
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
    socket = Path(settings(folder, component)["sidecar.socket"])
    assert {"name": "PD_SIDECAR_SOCKET", "value": str(socket)} in engine["env"]
    volumes = {volume["name"]: volume for volume in found.spec["volumes"]}
    for container in (sidecar, engine):
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        # The volume itself has mode 0777, which both ends refuse.
        assert "emptyDir" in volumes[mounts[str(socket.parent.parent)]]
        assert "configMap" in volumes[mounts["/etc/pd-sidecar"]]
    number = port(engine, "http")
    if engine["command"] == ["vllm", "serve"]:
        assert f"--port={number}" in engine["args"]
    else:
        assert {"name": "DYN_SYSTEM_PORT", "value": str(number)} in engine["env"]
    assert settings(folder, component)["sidecar.engine_url"] == f"http://{POD_IP}:{number}"


@everywhere
@pytest.mark.parametrize("component", ["prefill", "decode"])
def test_the_buffer_fits_into_the_memory_limit(folder: str, component: str) -> None:
    """Without room for the buffer the kernel would kill the sidecar at the first large transfer."""
    limit = pod(folder, component).container("sidecar")["resources"]["limits"]["memory"]
    buffer, *_ = settings(folder, component)["pd_buffer_size"].split()
    assert _bytes(limit) >= int(buffer) + GIB // 2


@everywhere
def test_grace_periods_cover_the_drains(folder: str) -> None:
    """Otherwise the kubelet would kill a process that still serves requests."""
    drain = 0
    if "proxy" in components(folder):
        proxy = pod(folder, "proxy")
        container = proxy.container("proxy")
        drain = _seconds(container["args"], r"--drain-timeout=(\d+)s")
        assert proxy.spec["terminationGracePeriodSeconds"] >= _hook_seconds(container) + drain + 5
    for component in ("prefill", "decode"):
        found = pod(folder, component)
        engine = found.container("engine")
        # A worker of Dynamo has no such flag.
        shutdown = _seconds(engine["args"], r"--shutdown-timeout=(\d+)") if engine["command"][0] == "vllm" else 0
        # An engine ends only after the proxy's requests.
        assert shutdown >= drain
        assert settings(folder, component)["sidecar.drain_timeout_ms"] == str(1000 * SIDECAR_DRAIN_S)
        needed = _hook_seconds(engine) + shutdown + SIDECAR_DRAIN_S + 10
        assert found.spec["terminationGracePeriodSeconds"] >= needed


@everywhere
def test_each_pod_has_only_its_own_key(folder: str) -> None:
    """All channels need keys, and no pod can act as another pod."""
    for component in components(folder):
        found = pod(folder, component)
        for container in found.containers():
            seen = {name: {item["key"] for item in items} for name, items in secret_mounts(found, container).values()}
            keys = seen.get("pd-keys", set())
            ours = container["name"] in ("proxy", "sidecar")
            assert keys == ({f"pd-{component}.key", "roster.yaml"} if ours else set())
            http = {"proxy": {"admin", "api"}, "engine": {"admin"}}.get(container["name"], set())
            http = http if folder in WITH_PROXY else set()
            assert seen.get("pd-proxy", set()) == http
            # The pod may read root's files, by its group, and the container writes none of them.
            assert found.spec["securityContext"]["fsGroup"] == 10001
    for component in ("prefill", "decode"):
        values = settings(folder, component)
        assert (values["sidecar.auth"], values["sidecar.insecure"]) == ("require", "false")
    if "proxy" in components(folder):
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
def test_variables_are_defined_before_they_are_used(folder: str) -> None:
    """Kubernetes replaces `$(NAME)` in a variable only if NAME stands above it. A patch may change the order."""
    for each in pods(folder):
        for container in each.containers():
            variables = container.get("env", [])
            names = [variable["name"] for variable in variables]
            for number, variable in enumerate(variables):
                used = re.findall(r"\$\((\w+)\)", variable.get("value", ""))
                assert set(used) <= set(names[:number]), f"{each.name}/{container['name']}: {variable}"
            words = " ".join([*container.get("command", []), *container.get("args", [])])
            assert set(re.findall(r"\$\((\w+)\)", words)) <= set(names), f"{each.name}/{container['name']}"


@everywhere
def test_a_disruption_takes_one_engine_at_a_time(folder: str) -> None:
    budgets = [m["spec"] for m in manifests(folder) if m["kind"] == "PodDisruptionBudget"]
    for component in ("prefill", "decode"):
        labels = pod(folder, component).labels
        (budget,) = (b for b in budgets if b["selector"]["matchLabels"].items() <= labels.items())
        assert budget["maxUnavailable"] == 1


def test_the_examples_of_the_page(tmp_path: Path) -> None:
    """docs/deploy.md shows folders with a user's settings. The settings reach the objects."""
    page = (ROOT / "docs" / "deploy.md").read_text()
    examples = re.findall(r"```yaml\n# my-pd/kustomization.yaml\n(.*?)```", page, re.DOTALL)
    models = [("overlays/tcp", "Qwen/Qwen3-8B"), ("overlays/llm-d", "openai/gpt-oss-120b")]
    for (overlay, model), example in zip(models, examples, strict=True):
        folder = tmp_path / overlay
        folder.mkdir(parents=True)
        assert f"resources: [../deploy/kubernetes/{overlay}]" in example
        (folder / "kustomization.yaml").write_text(
            example.replace("../deploy", os.path.relpath(KUBERNETES.parent, folder))
        )
        objects = {(m["kind"], m["metadata"]["name"]): m for m in manifests(str(folder))}
        assert objects["ConfigMap", "pd-model"]["data"] == {"MODEL": model}
        assert objects["Deployment", "pd-prefill"]["spec"]["replicas"] == (2 if overlay == "overlays/tcp" else 1)
        for found in pods(str(folder)):
            for container in found.containers():
                ours = (
                    "ROUTING_SIDECAR:TAG" if container["name"] == "routing-proxy" else "REGISTRY/pd-sidecar-vllm:0.1.0"
                )
                assert container["image"] == ours


def _custom(manifest: Manifest) -> bool:
    return ".x-k8s.io/" in manifest["apiVersion"]


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", text).groups()  # type: ignore[union-attr]
    return int(number) << (20 if unit == "Mi" else 30)


def _seconds(arguments: list[str], pattern: str) -> int:
    (found,) = (match for argument in arguments if (match := re.fullmatch(pattern, argument)))
    return int(found[1])


def _hook_seconds(container: Manifest) -> int:
    """Returns the longest time that a container's preStop hook takes."""
    hook = container["lifecycle"]["preStop"]
    if "sleep" in hook:
        seconds: int = hook["sleep"]["seconds"]
        return seconds
    command = hook["exec"]["command"]
    return _seconds(command, r"--timeout=(\d+)") if command[0] == "sidecar" else HOOK_BOUND_S
