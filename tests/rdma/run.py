"""Boots an emulated machine with RDMA devices and runs pytest in it.

    run.py FOLDER [ARGUMENT OF PYTEST ...]

FOLDER is the directory that `scripts/rdma.sh` filled. Needs no RDMA card, no KVM and no rights: QEMU translates the
code of the machine. The machine has the files of this host as its root, read-only. Only the build folder `target/` is
writable, so that the tests leave their logs there. Exits with pytest's code.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = ROOT / "target"
GUEST = Path(__file__).with_name("guest.sh")

# The machine boots in 15 s on two idle cores, and all tests take ten minutes.
BOUND_S = 2400
MEMORY = "5G"


def main() -> int:
    folder, arguments = Path(sys.argv[1]).resolve(), sys.argv[2:]
    (kernel,) = (folder / "system" / "boot").glob("vmlinuz-*")
    result, output = folder / "result", folder / "output"
    result.unlink(missing_ok=True)
    output.write_bytes(b"")
    (folder / "arguments").write_text(shlex.join(arguments) + "\n")
    guest = shlex.join(["bash", str(GUEST), str(ROOT), str(folder), sys.prefix, os.environ["PD_TEST_LMCACHE_VENV"]])
    command: list[str | Path] = [
        folder / "virtme" / "bin" / "virtme-run", "--kimg", kernel, "--mods", "auto",
        "--qemu-bin", folder / "bin" / "qemu-system-x86_64", "--busybox", folder / "bin" / "busybox",
        # Nested KVM is often broken, and microvm needs KVM. virtiofs needs a daemon; 9p is in QEMU.
        "--disable-kvm", "--disable-microvm", "--force-9p",
        "--memory", MEMORY, "--cpus", "2", "--rwdir", TARGET,
        "--overlay-rwdir", "/etc", "--script-sh", guest,
        "--qemu-opts", "-fsdev", "local,id=cached,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=cached,mount_tag=cached",
    ]  # fmt: skip
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    began = time.monotonic()
    with output.open("rb") as shown, (folder / "qemu.log").open("wb") as log:
        machine = subprocess.Popen(
            command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            while machine.poll() is None:
                show(shown)
                if time.monotonic() - began > BOUND_S:
                    print(f"error: the emulated machine did not end within {BOUND_S} s", file=sys.stderr)
                    return 1
                time.sleep(0.1)
            show(shown)
        finally:
            if machine.poll() is None:
                os.killpg(machine.pid, 9)
    if not result.exists():
        tail = (folder / "qemu.log").read_text(errors="replace")[-2000:]
        print(f"error: the emulated machine ended without a result. QEMU wrote:\n{tail}", file=sys.stderr)
        return 1
    print(f"the emulated machine ran for {time.monotonic() - began:.0f} s")
    return int(result.read_text())


def show(output: BinaryIO) -> None:
    """Prints what the machine has written since the last call."""
    sys.stdout.write(output.read().decode(errors="replace").replace("\r", ""))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
