"""Checks the systemd units with systemd's own tool, and their commands and times with our programs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from harness.sidecar import BINARIES, ROOT

UNITS = ROOT / "deploy" / "systemd"
BOUND_S = 120.0

# The time limits of the programs' own drains, in seconds: docs/proxy/flags.md and docs/reference/configuration.md.
DRAINS = {"pd-proxy.service": 30, "sidecar@.service": 10}
# The largest exposure that `systemd-analyze security` may report, in tenths. The proxy needs no device and no user; a
# sidecar needs GPUs, RDMA and shared memory.
EXPOSURES = {"pd-proxy.service": 20, "sidecar@.service": 45}

every_unit = pytest.mark.parametrize("unit", sorted(DRAINS))
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze on PATH: the systemd units are not verified"
)


def installed(unit: str, folder: Path) -> Path:
    """Writes the unit with the programs of this build, because systemd checks that they exist."""
    file = folder / unit.replace("@.", "@decode.")
    file.write_text((UNITS / unit).read_text().replace("/usr/bin/", f"{BINARIES.resolve()}/"))
    return file


def setting(unit: str, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", (UNITS / unit).read_text(), re.MULTILINE)


def analyze(*arguments: str | Path) -> str:
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=BOUND_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_systemd
@every_unit
def test_verify(unit: str, tmp_path: Path) -> None:
    """Unknown settings are only warnings for systemd, so the output must be empty."""
    file = installed(unit, tmp_path)
    assert file.name not in analyze("verify", "--man=no", file)


@needs_systemd
@every_unit
def test_exposure(unit: str, tmp_path: Path) -> None:
    report = analyze("security", "--offline=yes", f"--threshold={EXPOSURES[unit]}", installed(unit, tmp_path))
    assert "Overall exposure level" in report


@every_unit
def test_the_stop_time_covers_the_drain(unit: str) -> None:
    """Otherwise systemd would kill a process that still serves requests."""
    (stop,) = setting(unit, "TimeoutStopSec")
    assert int(stop.removesuffix("s")) >= DRAINS[unit] + 5
    # A wrong configuration ends a program with 64; restarts would not help.
    assert setting(unit, "RestartPreventExitStatus") == ["64"]


def test_the_sidecar_uses_the_folder_of_the_unit(tmp_path: Path) -> None:
    (command,) = setting("sidecar@.service", "ExecStart")
    assert command == "/usr/bin/sidecar --config /etc/pd-sidecar/%i.yaml"
    (variable,) = setting("sidecar@.service", "Environment")
    (folder,) = setting("sidecar@.service", "RuntimeDirectory")
    name, _, value = variable.partition("=")
    done = subprocess.run(
        [BINARIES / "sidecar", "check-config", ROOT / "configs" / "lmcache-decoder-config.yaml", "--json"],
        env={name: value.replace("%i", "decode")},
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    values = {entry["key"]: entry["value"] for entry in json.loads(done.stdout)["values"]}
    assert values["sidecar.socket"] == f"/run/{folder.replace('%i', 'decode')}/sidecar.sock"
