"""Builds the wheel with programs and connector, and installs it into a clean environment."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from harness.sidecar import BINARIES, ROOT


def run(*command: str | Path, bound_s: float = 60) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=bound_s, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_one_wheel_has_programs_and_connector(tmp_path: Path) -> None:
    run(ROOT / "scripts" / "wheel.sh", tmp_path / "dist", sys.executable, BINARIES, bound_s=300)
    (wheel,) = (tmp_path / "dist").glob("pd_sidecar-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    run(programs / "python", "-m", "pip", "install", "--disable-pip-version-check", "-q", wheel, bound_s=300)
    for program in ("sidecar", "pd-proxy", "pd-store"):
        assert run(programs / program, "--version").strip()
    # The wheel contains the connector with its types, and the connector finds the sidecar of the same wheel.
    code = (
        "import pathlib, pd_sidecar, pd_sidecar.client, pd_sidecar.sidecar.launcher as spawn;"
        "here = pathlib.Path(pd_sidecar.__file__).parent;"
        "print((here / 'connector.py').exists(), (here / 'py.typed').exists(), spawn.find_binary())"
    )
    found = run(programs / "python", "-c", code).split()
    assert found == ["True", "True", str(programs / "sidecar")]
    # The sidecar moves bytes without any other part of this project.
    table = run(programs / "sidecar", "selftest", "--transport", "tcp", bound_s=120).splitlines()
    transport, memory, requests, chunks, size, wrong = table[-1].split()[:6]
    assert (transport, memory, wrong) == ("tcp", "host", "0")
    assert int(requests) > 0 and int(chunks) > 0 and int(size) > 0
