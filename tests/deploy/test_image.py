"""Builds deploy/Containerfile.programs with buildah, which needs no daemon, and runs the programs of the image.

They run as the image's user, in mount and process namespaces of their own, on a root file system that is read-only, as
with `readOnlyRootFilesystem` in Kubernetes.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.client import call
from harness.ports import free_port
from harness.process import Process
from harness.sidecar import BINARIES, ROOT

BUILDAH = Path(os.environ.get("BUILDAH", ROOT / "target" / "buildah"))
BOUND_S = 120.0
PROGRAMS = ("sidecar", "pd-proxy", "pd-store")

# Mounts what a container runtime mounts, makes the root read-only, and runs a command as the user of the image.
INSIDE = """
set -e
user=$1 root=$2; shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mkdir -p "$root/proc" "$root/dev" "$root/tmp"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 dev "$root/dev"
mkdir -m 1777 "$root/dev/shm"
for device in null zero urandom; do touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
mount -t tmpfs -o size=64m tmp "$root/tmp"
mount -o remount,bind,ro "$root"
exec chroot --userspec="$user" "$root" "$@"
"""

pytestmark = [
    pytest.mark.skipif(
        not (BUILDAH / "buildah").exists(),
        reason=f"no buildah in {BUILDAH}: the image of the programs is not built; run `make buildah`",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="the image of the programs is not built: this user is not root"),
]


def buildah(*words: str | Path) -> str:
    done = subprocess.run([BUILDAH / "buildah", *words], capture_output=True, text=True, timeout=BOUND_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def within(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Yields the first words of a command that runs a program of the image."""
    context = tmp_path_factory.mktemp("image")
    for program in PROGRAMS:
        subprocess.run(["strip", "-o", context / program, BINARIES / program], check=True, timeout=BOUND_S)
    policy: list[str | Path] = ["--signature-policy", BUILDAH / "unpacked" / "etc" / "containers" / "policy.json"]
    base, image = (f"localhost/pd-test-{os.getpid()}-{name}" for name in ("base", "programs"))
    buildah("build", *policy, "--isolation", "chroot", "--tag", base, BUILDAH / "base")
    buildah(
        "build", *policy, "--isolation", "chroot", "--build-arg", f"BASE={base}",
        "--file", ROOT / "deploy" / "Containerfile.programs", "--tag", image, context,
    )  # fmt: skip
    container = buildah("from", *policy, "--pull-never", image)
    try:
        user = json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"]["User"]
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGTERM"]
        yield [*namespaces, "sh", "-c", INSIDE, "sh", user, buildah("mount", container)]
    finally:
        buildah("rm", container)
        buildah("rmi", image, base)


def test_the_programs_run_and_move_bytes(within: list[str]) -> None:
    """Every program starts, and the sidecar moves random chunks as the image's user."""
    for program in PROGRAMS:
        shown = subprocess.run([*within, program, "--version"], capture_output=True, text=True, timeout=60, check=False)
        assert shown.stdout.startswith(program), shown
    command = [*within, "sidecar", "selftest", "--transport", "tcp", "--seconds", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert result["bytes"] > 0 and result["wrong"] == 0


def test_the_proxy_serves_as_a_user_without_rights(within: list[str], logs: Path) -> None:
    port, registration = free_port(), free_port()
    flags = ["--listen", f"127.0.0.1:{port}", "--registration", f"127.0.0.1:{registration}"]
    process = Process("proxy of the image", [*within, "pd-proxy", *flags], logs / "image.log")
    try:
        deadline = time.monotonic() + 30.0
        while True:
            try:
                assert call(f"http://127.0.0.1:{port}/health", timeout_s=5.0)[0] == 200
                break
            except OSError:
                assert process.alive and time.monotonic() < deadline, process.tail()
                time.sleep(0.05)
        (proxy,) = (path for path in Path("/proc").glob("[0-9]*") if listens_as(path, port))
        status = (proxy / "status").read_text()
        assert "Uid:\t10001\t10001\t10001\t10001" in status and "CapEff:\t0000000000000000" in status
        mounts = [line.split() for line in (proxy / "mounts").read_text().splitlines()]
        assert any(mount[1] == "/" and "ro" in mount[3].split(",") for mount in mounts), mounts
    finally:
        process.kill()


def listens_as(path: Path, port: int) -> bool:
    """Returns true if a process of `/proc` is the program itself with this port, and not a shell that starts it."""
    try:
        words = (path / "cmdline").read_text().split("\0")
    except OSError:
        return False
    return words[0] == "pd-proxy" and f"127.0.0.1:{port}" in words
