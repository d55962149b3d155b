"""Renders the Kubernetes manifests as `kubectl` does, and finds the parts of pods in them."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.sidecar import BINARIES, ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
FOLDERS = ["base", *sorted(f"overlays/{path.parent.name}" for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))]
# Overlays for another router: they have no pd-proxy. The router's programs are not ours.
OTHER_ROUTERS = ["overlays/dynamo", "overlays/llm-d"]
WITH_PROXY = [folder for folder in FOLDERS if folder not in OTHER_ROUTERS]
RENDER_BOUND_S = 120.0

POD_IP = "10.0.0.9"

Manifest = dict[str, Any]


@dataclass
class Pod:
    """A pod template, with the name and the kind of the object that contains it."""

    name: str
    kind: str
    template: Manifest

    @property
    def spec(self) -> Manifest:
        spec: Manifest = self.template["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.template["metadata"]["labels"]
        return labels

    def containers(self) -> list[Manifest]:
        """Returns all containers: those of `initContainers` first."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def container(self, name: str) -> Manifest:
        return next(container for container in self.containers() if container["name"] == name)


def manifests(folder: str) -> list[Manifest]:
    """Returns the objects of a base or an overlay. Skips the test if this machine has no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on PATH: the Kubernetes manifests are not rendered and not tested (any kubectl 1.27+)")
    return _rendered(folder)


@functools.cache
def _rendered(folder: str) -> list[Manifest]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / folder)],
        capture_output=True,
        text=True,
        timeout=RENDER_BOUND_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    _inject(documents)
    return documents


def _inject(documents: list[Manifest]) -> None:
    """Adds to the roles of a RoleBasedGroup what its controller adds from the profiles that the roles name: each init
    container and each volume whose name the pod does not have yet.
    """
    profiles = {m["metadata"]["name"]: m["spec"] for m in documents if m["kind"] == "ClusterEngineRuntimeProfile"}
    for group in (document for document in documents if document["kind"] == "RoleBasedGroup"):
        for role in group["spec"]["roles"]:
            spec = role["standalonePattern"]["template"]["spec"]
            for runtime in role.get("engineRuntimes", []):
                for part in ("initContainers", "volumes"):
                    there = spec.setdefault(part, [])
                    names = {each["name"] for each in there}
                    there += [each for each in profiles[runtime["profileName"]][part] if each["name"] not in names]


def pods(folder: str) -> list[Pod]:
    """Returns the pod templates of all objects, also of kinds that only a custom resource defines."""
    return [
        Pod(path[-1] if path else manifest["metadata"]["name"], manifest["kind"], template)
        for manifest in manifests(folder)
        for path, template in _templates(manifest.get("spec", {}), ())
    ]


def pod(folder: str, component: str) -> Pod:
    """Returns the only pod template of a component: proxy, prefill or decode."""
    (found,) = (pod for pod in pods(folder) if pod.labels["app.kubernetes.io/component"] == component)
    return found


def components(folder: str) -> list[str]:
    """Returns the components whose programs are ours."""
    return ["prefill", "decode", *(["proxy"] if folder in WITH_PROXY else [])]


def _templates(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Manifest]]:
    """Yields each mapping that contains containers of a pod, with the names of the entries that lead to it."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}) and "metadata" in value:
            yield path, value
            return
        inner = (*path, value["name"]) if isinstance(value.get("name"), str) else path
        for item in value.values():
            yield from _templates(item, inner)
    elif isinstance(value, list):
        for item in value:
            yield from _templates(item, path)


def config_files(folder: str) -> dict[str, str]:
    """Returns the files of the config map that the pods mount."""
    (found,) = (m for m in manifests(folder) if m["kind"] == "ConfigMap" and m["metadata"]["name"] == "pd-sidecar")
    data: dict[str, str] = found["data"]
    return data


@functools.cache
def checked(folder: str, component: str) -> Manifest:
    """Returns what `sidecar check-config` says of a rendered configuration, with the environment of its container."""
    found = pod(folder, component)
    container = found.container("sidecar")
    program, config, *arguments = command(container)
    assert program == "sidecar"
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        (here / "config").mkdir()
        moved = mount(found, container, _secrets_once(), here / "pod") | {"/etc/pd-sidecar": here / "config"}
        for file, text in config_files(folder).items():
            (here / "config" / file).write_text(at_home(text, moved))
        variables = environment(container, f"pd-{component}-0")
        file = at_home(config.removeprefix("--config="), moved)
        done = subprocess.run(
            [BINARIES / "sidecar", "check-config", file, "--json", *arguments],
            env={key: at_home(value, moved) for key, value in variables.items()},
            capture_output=True,
            text=True,
            timeout=RENDER_BOUND_S,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    answer: Manifest = json.loads(done.stdout)
    return answer


def settings(folder: str, component: str) -> dict[str, str]:
    """Returns the values that a sidecar takes from its configuration and its environment."""
    return {entry["key"]: entry["value"] for entry in checked(folder, component)["values"]}


def at_home(text: str, folders: dict[str, Path]) -> str:
    """Replaces the paths of a pod by those of this host."""
    for mounted, folder in folders.items():
        text = text.replace(mounted, str(folder))
    return text


def environment(container: Manifest, name: str = "pod-0") -> dict[str, str]:
    """Returns the variables that a kubelet would set in a container of the pod `name`, without those from secrets."""
    values: dict[str, str] = {}
    for variable in container.get("env", []):
        if "value" in variable:
            values[variable["name"]] = _expanded(variable["value"], values)
        elif path := variable["valueFrom"].get("fieldRef", {}).get("fieldPath"):
            values[variable["name"]] = {"status.podIP": POD_IP, "metadata.name": name}[path]
    return values


def command(container: Manifest) -> list[str]:
    """Returns the command and the arguments, with the variables in them replaced."""
    values = environment(container)
    return [_expanded(word, values) for word in [*container["command"], *container.get("args", [])]]


def _expanded(text: str, values: dict[str, str]) -> str:
    """Replaces `$(NAME)` as Kubernetes does: an unknown name stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda found: values.get(found[1], found[0]), text)


@functools.cache
def page_commands() -> list[list[str]]:
    """Returns the commands with which docs/deploy.md makes keys and secrets."""
    page = (ROOT / "docs" / "deploy.md").read_text()
    lines = re.findall(r"^(?:sidecar keygen|kubectl -n pd create secret generic pd-)[^#\n]*", page, re.MULTILINE)
    return [line.split() for line in lines]


def secrets(folder: Path) -> dict[str, dict[str, bytes]]:
    """Runs the page's commands in `folder`. Returns the files of each secret; kubectl sends nothing to a cluster."""
    made = {}
    for program, *arguments in page_commands():
        words = [re.sub(r"\$\(openssl rand -hex 16\)", os.urandom(16).hex(), word) for word in _joined(arguments)]
        command: list[str | Path] = [BINARIES / "sidecar", *words]
        if program == "kubectl":
            command = ["kubectl", *words, "--dry-run=client", "--output=json"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=RENDER_BOUND_S, check=False)
        assert done.returncode == 0, done.stderr
        if program == "kubectl":
            secret = json.loads(done.stdout)
            made[secret["metadata"]["name"]] = {name: b64decode(text) for name, text in secret["data"].items()}
    return made


@functools.cache
def _secrets_once() -> dict[str, dict[str, bytes]]:
    with tempfile.TemporaryDirectory() as name:
        return secrets(Path(name))


def _joined(words: list[str]) -> list[str]:
    """Joins the words of each `$(...)`."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].count("$(") > joined[-1].count(")"):
            joined[-1] += f" {word}"
        else:
            joined.append(word)
    return joined


def secret_mounts(found: Pod, container: Manifest) -> dict[str, tuple[str, list[Manifest]]]:
    """Returns the name of the secret, and its items, for each path at which the container sees a secret."""
    volumes = {volume["name"]: volume.get("secret") for volume in found.spec.get("volumes", [])}
    mounts = {mount["mountPath"]: volumes.get(mount["name"]) for mount in container.get("volumeMounts", [])}
    return {path: (secret["secretName"], secret["items"]) for path, secret in mounts.items() if secret}


def mount(found: Pod, container: Manifest, made: dict[str, dict[str, bytes]], root: Path) -> dict[str, Path]:
    """Writes the secrets that a container sees below `root`. Returns the folder that takes the place of each path."""
    folders = {}
    for path, (secret, items) in secret_mounts(found, container).items():
        folder = root / path.strip("/")
        folder.mkdir(parents=True)
        for item in items:
            file = folder / item["path"]
            file.write_bytes(made[secret][item["key"]])
            # The kubelet gives root's files to the pod's group. A user who is not root has no such files.
            file.chmod(0o440 if os.geteuid() == 0 else 0o400)
        folders[path] = folder
    return folders


def port(container: Manifest, name: str | int) -> int:
    """Returns the number of a port that a probe or a service names."""
    if isinstance(name, int):
        return name
    number: int = next(port["containerPort"] for port in container["ports"] if port["name"] == name)
    return number
