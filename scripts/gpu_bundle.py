#!/usr/bin/env python3
"""Packs everything that a GPU host without a network needs for `make gpu-test` and `make gpu-bench`.

    gpu_bundle.py OUT [--only ours] [--vllm 0.24.0] [--nixl 1.5.1] [--lmcache 0.5.1] [--binaries target/dist]

The host must have Linux on x86_64, Python 3.12 and the packages of `scripts/gpu-host-packages.txt`, above all PyTorch
for CUDA 13. The script writes parts of at most 58 MB into OUT, for hosts that accept only small files, and `unpack.sh`:

    sh unpack.sh DIR      unpacks all parts beside it; then `. DIR/env.sh` and, in DIR/repo, `make gpu-bench`

The bundle leaves out the packages that no dense model on Hopper needs: FlashAttention 2, DeepGEMM, FlashMLA, kernels
for mixtures of experts (unless --moe), header files and static libraries.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PART_BYTES = 58 << 20
PYTHON = "3.12"
GLIBC = range(39, 4, -1)

# A dense model does not use these packages, or they are only for other GPUs. Some of these packages are larger than the
# whole bundle.
NOT_NEEDED = {
    "flashinfer-cubin", "tilelang", "z3-solver", "tokenspeed-mla", "tokenspeed-triton", "cuda-tile", "cuda-python",
    "humming-kernels",
}  # fmt: skip
TRIM_VLLM = (
    "vllm/third_party/fmha_sm100", "vllm/third_party/deep_gemm", "vllm/_qutlass_C*", "vllm/_flashmla*", "vllm/vllm-rs",
    "vllm/vllm_flash_attn/_vllm_fa2_C*", "vllm/entrypoints/serve/instrumentator/static", "pycountry/locales",
    "xgrammar/lib/*.a", "flashinfer/data/cutlass",
    "mistral_common/data/tekken_24*",
)  # fmt: skip
TRIM_MOE = ("vllm/_moe_C*",)
TRIM_NIXL = (
    "nixl_ep_cu13", "nixl_cu13.scripts", "nixl_cu13-*.data", "nixl_cu13.libs/*aws*", "nixl_cu13.libs/*azure*",
    "nixl_cu13.libs/*gusli*", "nixl_cu13.libs/libs2n*",
)  # fmt: skip

# Packages that LMCache imports and that neither vLLM nor the host has.
LMCACHE_NEEDS = (
    "aiofile", "caio", "awscrt", "redis", "nvtx", "httptools", "opentelemetry-exporter-prometheus==0.61b0",
    "importlib_metadata", "cufile-python",
)  # fmt: skip

UNPACK = r"""#!/bin/sh
# Unpacks the files beside this one into DIR: unpack.sh DIR
set -eu
from=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/site" "$1/nixl" "$1/lmcache" "$1/repo"
to=$(cd "$1" && pwd)
[ -e "$from/ours.tgz" ] && tar xzf "$from/ours.tgz" -C "$to/repo"
[ -e "$from/nixl.tgz" ] && tar xzf "$from/nixl.tgz" -C "$to/nixl"
[ -e "$from/lmcache.tgz" ] && tar xzf "$from/lmcache.tgz" -C "$to/lmcache"
# Python unpacks the xz archive, because some hosts have no xz program.
if [ ! -e "$to/site/vllm" ]; then
  cat "$from"/site.txz.* | python3 -c "import sys, tarfile
tarfile.open(fileobj=sys.stdin.buffer, mode='r|xz').extractall('$to/site', filter='fully_trusted')"
fi
cat > "$to/env.sh" <<END
export PYTHONPATH=$to/site:$to/lmcache:$to/nixl PD_BINARIES=$to/repo/bin
capi=\$(ls $to/nixl/.nixl_cu13.mesonpy.libs/libnixl_capi.so $to/nixl/nixl_cu13.libs/libnixl_capi* 2>/dev/null)
export PD_NIXL_CAPI=\$(echo "\$capi" | head -n1)
export VENV= GPU_PYTHON=python3
END
echo "unpacked to $to; now: . $to/env.sh; cd $to/repo; make gpu-test gpu-bench"
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the archives and unpack.sh")
    parser.add_argument("--only", choices=("vllm", "nixl", "lmcache", "ours"), help="pack only this part")
    parser.add_argument("--vllm", default="0.24.0", help="version of vLLM")
    parser.add_argument("--nixl", default="1.5.1", help="version of NIXL")
    parser.add_argument("--lmcache", default="0.5.1", help="version of LMCache")
    parser.add_argument("--moe", action="store_true", help="include the kernels for mixtures of experts")
    parser.add_argument("--binaries", type=Path, default=ROOT / "target" / "dist", help="folder with our programs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = {"vllm": pack_vllm, "nixl": pack_nixl, "lmcache": pack_lmcache, "ours": pack_ours}
    for name, pack in parts.items():
        if options.only in (None, name):
            print(f"packing {name}", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix="pd-bundle-") as folder:
                pack(options, Path(folder))
    (options.out / "unpack.sh").write_text(UNPACK)
    for path in sorted(options.out.iterdir()):
        print(f"{path.stat().st_size / 1e6:8.1f} MB  {path}")
    return 0


def pack_vllm(options: argparse.Namespace, folder: Path) -> None:
    """Packs vLLM with its dependencies into one archive and splits the archive."""
    report = folder / "report.json"
    pip(
        "install",
        "--dry-run",
        "--ignore-installed",
        "--report",
        report,
        "--target",
        folder / "none",
        f"vllm=={options.vllm}",
    )
    present = set((ROOT / "scripts" / "gpu-host-packages.txt").read_text().split())
    wanted = []
    for item in json.loads(report.read_text())["install"]:
        name = item["metadata"]["name"].lower().replace("_", "-")
        if name not in present | NOT_NEEDED and not name.startswith("nvidia-"):
            wanted.append(f"{name}=={item['metadata']['version']}")
    site = unpacked(folder, wanted)
    trim(site, TRIM_VLLM + (() if options.moe else TRIM_MOE))
    for old in options.out.glob("site.txz.*"):
        old.unlink()
    packed = folder / "site.txz"
    with packed.open("wb") as output:
        tar = subprocess.Popen(["tar", "cf", "-", "-C", site, "."], stdout=subprocess.PIPE)
        # Compress in separate blocks, so that the host can unpack with all its cores.
        subprocess.run(["xz", "-T0", "-6", "--block-size=16MiB"], stdin=tar.stdout, stdout=output, check=True)
        if tar.wait() != 0:
            raise RuntimeError("tar failed")
    with packed.open("rb") as data:
        number = 0
        while part := data.read(PART_BYTES):
            (options.out / f"site.txz.{number}").write_bytes(part)
            number += 1


def pack_nixl(options: argparse.Namespace, folder: Path) -> None:
    """Packs NIXL with only its UCX backend."""
    site = unpacked(folder, [f"nixl-cu13=={options.nixl}", f"nixl=={options.nixl}"])
    trim(site, TRIM_NIXL)
    for plugin in site.rglob("libplugin_*"):
        if plugin.name != "libplugin_UCX.so":
            plugin.unlink()
    pack_folder(site, options.out / "nixl.tgz")


def pack_lmcache(options: argparse.Namespace, folder: Path) -> None:
    """Packs LMCache, one of the baselines, with the packages that it needs in addition to vLLM."""
    site = unpacked(folder, [f"lmcache=={options.lmcache}", *LMCACHE_NEEDS])
    pack_folder(site, options.out / "lmcache.tgz")


def pack_ours(options: argparse.Namespace, folder: Path) -> None:
    """Packs the binaries without symbols, and the files of this repository that the make targets need."""
    binaries = folder / "bin"
    binaries.mkdir()
    for name in ("sidecar", "pd-proxy"):
        shutil.copy(options.binaries / name, binaries / name)
        subprocess.run(["strip", binaries / name], check=True)
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "Makefile", "pyproject.toml"]
    files = subprocess.run(
        [*listing, "python", "tests", "scripts"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    with tarfile.open(options.out / "ours.tgz", "w:gz") as tar:
        for name in files.stdout.splitlines():
            tar.add(ROOT / name, name)
        tar.add(binaries, "bin")


def unpacked(folder: Path, requirements: list[str]) -> Path:
    """Downloads and unpacks wheels. Returns the folder of the unpacked wheels, for PYTHONPATH."""
    wheels, site = folder / "wheels", folder / "site"
    names = folder / "names.txt"
    names.write_text("\n".join(requirements) + "\n")
    pip("download", "--no-deps", "--dest", wheels, "-r", names)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return site


def trim(site: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in site.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def pack_folder(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
        tar.add(folder, ".")


def pip(command: object, *arguments: object) -> None:
    """Runs pip for the Python and the platform of the GPU host, which may differ from this machine's."""
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    target = ["--python-version", PYTHON, "--implementation", "cp", "--only-binary=:all:"]
    for abi in ("cp312", "abi3", "none"):
        target += ["--abi", abi]
    for platform in platforms:
        target += ["--platform", platform]
    subprocess.run([sys.executable, "-m", "pip", str(command), "-q", *target, *map(str, arguments)], check=True)


if __name__ == "__main__":
    sys.exit(main())
