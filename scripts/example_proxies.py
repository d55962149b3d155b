#!/usr/bin/env python3
"""Fetches the example proxies of vLLM and LMCache, which only the projects' source archives contain.

    example_proxies.py DIRECTORY

pip fetches each archive (vLLM: 45 MB, LMCache: 10 MB) and checks the hash. The script keeps only the proxies. A stamp
in the directory holds the list of files; if the list is unchanged, the script does nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ARCHIVES = (
    {
        "package": "vllm", "version": "0.32.0",
        "sha256": "d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad",
        "files": {
            "nixl_proxy.py": "tests/v1/kv_connector/nixl_integration/toy_proxy_server.py",
            "nixl_push_proxy.py": "examples/disaggregated/disaggregated_serving/disagg_proxy_pushconnector_demo.py",
        },
    },
    {
        "package": "lmcache", "version": "0.5.6",
        "sha256": "d6951e60ce8818a76aa42d0866a4ba85f1c95cd919355fff30ff24dcc3243f1e",
        "files": {"lmcache_proxy.py": "examples/disagg_prefill/disagg_proxy_server.py"},
    },
)  # fmt: skip

# pip asks the build system of an archive for the package's metadata, even if pip only fetches the archive. The real
# build system of vLLM would first install torch for GPUs. This module takes its place and runs nothing of the archive.
BUILD_SYSTEM = """
import os, pathlib


def get_requires_for_build_wheel(config_settings=None):
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name, version = os.environ["PD_PACKAGE"], os.environ["PD_VERSION"]
    folder = pathlib.Path(metadata_directory, f"{name}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder.name


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    raise NotImplementedError
"""


def fetch(package: str, version: str, sha256: str, files: dict[str, str], into: Path) -> None:
    """Fetches the archive of one package, and unpacks these files of it under these names."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "setuptools").mkdir()
        (folder / "setuptools" / "__init__.py").touch()
        (folder / "setuptools" / "build_meta.py").write_text(BUILD_SYSTEM)
        requirement = folder / "requirement.txt"
        requirement.write_text(f"{package}=={version} --hash=sha256:{sha256}\n")
        subprocess.run(
            [
                sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                "--no-binary", ":all:", "--no-build-isolation", "--require-hashes", "-r", requirement, "-d", folder,
            ],
            check=True,
            env={**os.environ, "PYTHONPATH": name, "PD_PACKAGE": package, "PD_VERSION": version},
        )  # fmt: skip
        with tarfile.open(folder / f"{package}-{version}.tar.gz") as archive:
            for target, path in files.items():
                content = archive.extractfile(f"{package}-{version}/{path}")
                assert content is not None, f"{path} is not a file"
                (into / target).write_bytes(content.read())


def main() -> int:
    into = Path(sys.argv[1])
    stamp, wanted = into / ".made-from", json.dumps(ARCHIVES)
    if stamp.is_file() and stamp.read_text() == wanted:
        return 0
    into.mkdir(parents=True, exist_ok=True)
    for archive in ARCHIVES:
        fetch(into=into, **archive)  # type: ignore[arg-type]
    stamp.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
