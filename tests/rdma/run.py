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

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET = ROOT / "target"
GUEST = Path(__file__).with_name("guest.sh")

# The machine boots in 15 s on two idle cores, and all tests take ten minutes.
BOUND_S = 2400
MEMORY = "5G"


def main() -> int:
    folder, arguments = Path(sys.argv[1]).resolve(), sys.argv[2:]
    (kernel,) = (folder / "system" / "boot").glob("vmlinuz-*")
    result = folder / "result"
    result.unlink(missing_ok=True)
    (folder / "arguments").write_text(shlex.join(arguments) + "\n")
    guest = shlex.join(["bash", str(GUEST), str(ROOT), str(folder), sys.prefix, os.environ["PD_TEST_LMCACHE_VENV"]])
    command: list[str | Path] = [
        folder / "virtme" / "bin" / "virtme-run", "--kimg", kernel, "--mods", "auto",
        "--qemu-bin", folder / "bin" / "qemu-system-x86_64", "--busybox", folder / "bin" / "busybox",
        # Nested KVM is often broken, and microvm needs KVM. virtiofs needs a daemon; 9p is in QEMU.
        "--disable-kvm", "--disable-microvm", "--force-9p",
        "--memory", MEMORY, "--cpus", "2", "--rwdir", TARGET,
        "--overlay-rwdir", "/etc", "--script-sh", f"{guest} 2>&1",
        "--qemu-opts", "-fsdev", "local,id=cached,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=cached,mount_tag=cached",
    ]  # fmt: skip
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    began = time.monotonic()
    # QEMU opens its standard output again and would truncate a file, so it gets a pipe.
    machine = subprocess.Popen(
        command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    assert machine.stdout is not None
    os.set_blocking(machine.stdout.fileno(), False)
    try:
        while machine.poll() is None or show(machine.stdout.fileno()):
            show(machine.stdout.fileno())
            if time.monotonic() - began > BOUND_S:
                print(f"error: the emulated machine did not end within {BOUND_S} s", file=sys.stderr)
                return 1
            time.sleep(0.1)
    finally:
        if machine.poll() is None:
            os.killpg(machine.pid, 9)
    if not result.exists():
        print("error: the emulated machine ended without a result", file=sys.stderr)
        return 1
    print(f"the emulated machine ran for {time.monotonic() - began:.0f} s")
    return int(result.read_text())


def show(output: int) -> bool:
    """Prints what the machine has written. Returns true if there was anything."""
    try:
        text = os.read(output, 1 << 16)
    except BlockingIOError:
        return False
    sys.stdout.write(text.decode(errors="replace").replace("\r", ""))
    sys.stdout.flush()
    return bool(text)


if __name__ == "__main__":
    sys.exit(main())
