"""Builds the wheel with programs and connector, and installs it into a clean environment."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import aiohttp
from harness.sidecar import BINARIES, ROOT


def run(*command: str | Path, bound_s: float = 300) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=bound_s, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def check_pages(share: Path) -> None:
    """Checks the manual pages and the completions of all programs."""
    pages = {page.name for page in (share / "man" / "man1").iterdir()}
    assert {"sidecar.1", "sidecar-doctor.1", "sidecar-check-config.1", "pd-proxy.1", "pd-store.1"} <= pages
    assert not any("help" in page or "manual" in page for page in pages)
    text = (share / "man" / "man1" / "sidecar-doctor.1").read_text()
    assert ".TH sidecar-doctor 1" in text
    assert "Init port of a receiver" in text and "ignore" in text
    for program in ("sidecar", "pd-proxy", "pd-store"):
        bash = share / "bash-completion" / "completions" / program
        # Bash accepts the script, and knows a function for the program then.
        known = run("bash", "-c", f"source {bash} && complete -p {program}")
        assert " -F _" in known and known.split()[-1] == program
        assert (share / "zsh" / "site-functions" / f"_{program}").read_text().startswith(f"#compdef {program}")
        assert f"complete -c {program}" in (share / "fish" / "vendor_completions.d" / f"{program}.fish").read_text()
    completed = run(
        "bash", "-c",
        f"source {share}/bash-completion/completions/sidecar; COMP_WORDS=(sidecar doc) COMP_CWORD=1; "
        "_sidecar sidecar doc sidecar; echo ${COMPREPLY[@]}",
    )  # fmt: skip
    assert completed.split() == ["doctor"]


def check_licences(metadata: Path) -> None:
    """Checks that the bill of materials names every crate, and that the licence of each crate comes along."""
    bill = json.loads((metadata / "sboms" / "pd-sidecar.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    components = {component["bom-ref"]: component for component in bill["components"]}
    crates = [component for component in components.values() if "hashes" in component]
    assert len(crates) > 100
    assert all(component["licenses"][0]["expression"] for component in components.values())
    assert all(need in components for entry in bill["dependencies"] for need in entry["dependsOn"])
    assert {"tokio", "rustls", "clap"} <= {crate["name"] for crate in crates}
    texts = (metadata / "licenses" / "THIRD-PARTY-LICENSES.txt").read_text()
    missing = [crate["name"] for crate in crates if f"{crate['name']} {crate['version']}" not in texts]
    assert not missing
    assert "Apache License" in (metadata / "licenses" / "LICENSE").read_text()


def test_one_wheel_has_programs_and_connector(tmp_path: Path) -> None:
    run(ROOT / "scripts" / "wheel.sh", tmp_path / "dist", sys.executable, BINARIES, bound_s=300)
    (wheel,) = (tmp_path / "dist").glob("pd_sidecar-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    run(programs / "python", "-m", "pip", "install", "--disable-pip-version-check", "-q", wheel, bound_s=300)
    for program in ("sidecar", "pd-proxy", "pd-store"):
        assert run(programs / program, "--version").strip()
    # The wheel alone lacks aiohttp, which engines have.
    alone = subprocess.run([programs / "pd-bench", "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert (alone.returncode, "pd-sidecar[bench]" in alone.stderr) == (64, True), alone.stderr
    engine = Path(aiohttp.__file__).parent.parent
    assert "--rate" in run("env", f"PYTHONPATH={engine}", programs / "pd-bench", "run", "--help")
    check_pages(tmp_path / "venv" / "share")
    (metadata,) = (tmp_path / "venv").glob("lib/python3*/site-packages/pd_sidecar-*.dist-info")
    check_licences(metadata)
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
