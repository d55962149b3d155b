#!/usr/bin/env python3
"""Lists the Rust crates inside the programs, with their licences, for the wheel.

    sbom.py FOLDER

The script writes two files into FOLDER: `pd-sidecar.cdx.json`, a bill of materials in the format CycloneDX 1.6, and
`THIRD-PARTY-LICENSES.txt`, with the texts of all licences. The list is from `cargo metadata` and `Cargo.lock`: it has
exactly the crates that the build uses. Crates that only take part in the build (build scripts, tests) are left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("pd-sidecar", "pd-proxy", "pd-store")
TARGET = "x86_64-unknown-linux-gnu"
LICENCE_FILE = re.compile(r"^(LICEN[CS]E|COPYING|COPYRIGHT|NOTICE|UNLICENSE)", re.IGNORECASE)


def metadata() -> dict[str, Any]:
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", TARGET]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(listed.stdout)
    return found


def linked(found: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """Returns the packages that become part of the programs, by their ids, and the dependencies of each package."""
    packages = {package["id"]: package for package in found["packages"]}
    nodes = {node["id"]: node for node in found["resolve"]["nodes"]}
    waiting = [id_ for id_, package in packages.items() if package["name"] in PROGRAMS]
    needs: dict[str, list[str]] = {}
    while waiting:
        id_ = waiting.pop()
        if id_ in needs:
            continue
        # A dependency without a kind is a normal one. The others are for build scripts and tests.
        normal = [dep["pkg"] for dep in nodes[id_]["deps"] if any(kind["kind"] is None for kind in dep["dep_kinds"])]
        needs[id_] = sorted(normal)
        waiting += normal
    return {id_: packages[id_] for id_ in sorted(needs)}, needs


def checksums() -> dict[tuple[str, str], str]:
    """Returns the SHA-256 of each crate's archive, by its name and version."""
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())
    return {(p["name"], p["version"]): p["checksum"] for p in lock["package"] if "checksum" in p}


def reference(package: dict[str, Any]) -> str:
    return f"pkg:cargo/{package['name']}@{package['version']}"


def expression(package: dict[str, Any]) -> str:
    """Returns the SPDX expression of a crate's licence. Old crates write `/` for `OR`."""
    licence = package["license"]
    if not licence:
        raise SystemExit(f"error: {package['name']} {package['version']} names no licence")
    return str(licence).replace("/", " OR ")


def bill(packages: dict[str, dict[str, Any]], needs: dict[str, list[str]]) -> dict[str, Any]:
    """Returns the bill of materials."""
    sums = checksums()
    components = []
    for package in packages.values():
        component: dict[str, Any] = {
            "type": "application" if package["name"] in PROGRAMS else "library",
            "bom-ref": reference(package),
            "name": package["name"],
            "version": package["version"],
            "purl": reference(package),
            "licenses": [{"expression": expression(package)}],
        }
        if checksum := sums.get((package["name"], package["version"])):
            component["hashes"] = [{"alg": "SHA-256", "content": checksum}]
        components.append(component)
    version = next(package["version"] for package in packages.values() if package["name"] == PROGRAMS[0])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": "pd-sidecar-wheel",
                "name": "pd-sidecar",
                "version": version,
            }
        },
        "components": components,
        "dependencies": [
            {"ref": reference(packages[id_]), "dependsOn": sorted(reference(packages[dep]) for dep in deps)}
            for id_, deps in needs.items()
        ],
    }


def texts(packages: dict[str, dict[str, Any]]) -> str:
    """Returns the texts of all licences, each text once, with the crates to which it belongs."""
    users: dict[str, list[str]] = defaultdict(list)
    alone: list[str] = []
    for package in packages.values():
        if package["source"] is None:
            continue  # this project, whose licence is in the wheel
        folder = Path(package["manifest_path"]).parent
        name = f"{package['name']} {package['version']}"
        files = sorted(file for file in folder.iterdir() if file.is_file() and LICENCE_FILE.match(file.name))
        for file in files:
            users[file.read_text(errors="replace").strip()].append(name)
        if not files:
            authors = ", ".join(package["authors"]) or "its authors"
            alone.append(f"{name}: {expression(package)}, copyright {authors}")
    rule = "=" * 80
    parts = [
        "The programs in this wheel contain the crates below. Crates whose archive has no text of its licence:",
        "\n".join(sorted(alone)),
    ]
    for text, names in sorted(users.items(), key=lambda item: item[1]):
        parts += [rule, ", ".join(names), text]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} FOLDER", file=sys.stderr)
        return 64
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    packages, needs = linked(metadata())
    (folder / "pd-sidecar.cdx.json").write_text(json.dumps(bill(packages, needs), indent=1) + "\n")
    (folder / "THIRD-PARTY-LICENSES.txt").write_text(texts(packages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
