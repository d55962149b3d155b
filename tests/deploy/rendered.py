"""Renders the Kubernetes manifests as `kubectl` does, and finds the parts of pods in them."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.sidecar import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
FOLDERS = ["base", *sorted(f"overlays/{path.parent.name}" for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))]
RENDER_BOUND_S = 60.0

POD_IP = "10.0.0.9"
POD_NAME = "pod-0"

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
    return [document for document in yaml.safe_load_all(done.stdout) if document]


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


def environment(container: Manifest) -> dict[str, str]:
    """Returns the variables that a kubelet would set in the container. Variables from secrets are absent."""
    values: dict[str, str] = {}
    for variable in container.get("env", []):
        if "value" in variable:
            values[variable["name"]] = _expanded(variable["value"], values)
        elif path := variable["valueFrom"].get("fieldRef", {}).get("fieldPath"):
            values[variable["name"]] = {"status.podIP": POD_IP, "metadata.name": POD_NAME}[path]
    return values


def command(container: Manifest) -> list[str]:
    """Returns the command and the arguments, with the variables in them replaced."""
    values = environment(container)
    return [_expanded(word, values) for word in [*container["command"], *container.get("args", [])]]


def _expanded(text: str, values: dict[str, str]) -> str:
    """Replaces `$(NAME)` as Kubernetes does: an unknown name stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda found: values.get(found[1], found[0]), text)


def port(container: Manifest, name: str | int) -> int:
    """Returns the number of a port that a probe or a service names."""
    if isinstance(name, int):
        return name
    number: int = next(port["containerPort"] for port in container["ports"] if port["name"] == name)
    return number


def write_config(folder: str, target: Path) -> None:
    """Writes the files of the config map, as a pod's volume would show them."""
    for name, text in config_files(folder).items():
        (target / name).write_text(text)
