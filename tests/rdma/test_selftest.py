"""Runs the sidecar's own check over real verbs, with and without the provider library of the device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.sidecar import BINARIES

from rdma.devices import RC, SYSTEMS_LIBIBVERBS, UD, counted, with_systems_libibverbs

PROVIDERS = Path("/usr/lib/x86_64-linux-gnu/libibverbs")


def selftest(env: dict[str, str], seconds: str = "3") -> subprocess.CompletedProcess[str]:
    # Small chunks: an emulated core moves 20 MB/s, and a request of a selftest must end within 10 s.
    size = ["--chunk-bytes", str(256 << 10), "--buffer-size", str(4 << 20)]
    return subprocess.run(
        [BINARIES / "sidecar", "selftest", "--seconds", seconds, "--transport", "nixl", "--json", *size],
        env={"VIRTUAL_ENV": sys.prefix, "PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def without_providers() -> Iterator[None]:
    """Removes the providers of the system, as if the package were not installed."""
    away = PROVIDERS.with_name("libibverbs.away")
    PROVIDERS.rename(away)
    try:
        yield
    finally:
        away.rename(PROVIDERS)


@pytest.mark.parametrize("env", [RC, UD], ids=["rc", "ud"])
def test_selftest(env: dict[str, str]) -> None:
    with counted() as sent:
        done = selftest(env)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = json.loads(done.stdout)
    print(f"\n{report['bytes']} bytes in {report['chunks']} chunks, {report['wrong']} wrong; {sent}")
    assert report["wrong"] == 0 and report["chunks"] > 0
    assert sent.carries(report["bytes"]), sent


def test_a_missing_provider_is_named_before_ucx_gives_up() -> None:
    with without_providers():
        done = selftest(RC)
    print(f"\n{done.stderr}")
    assert done.returncode != 0
    for part in ("rxe0 (driver rxe, port 1 ACTIVE)", "libibverbs-", "librxe-rdmav*.so", "ibverbs-providers"):
        assert part in done.stderr, done.stderr


def test_a_preloaded_libibverbs_does_no_harm() -> None:
    """If `LD_PRELOAD` names the library to which the sidecar's link leads, the linker loads it once."""
    done = selftest({**RC, "LD_PRELOAD": SYSTEMS_LIBIBVERBS}, "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)[0]["wrong"] == 0


def test_a_link_gives_other_programs_the_systems_libibverbs(tmp_path: Path) -> None:
    """The way for other programs that use NIXL's wheel, for example LMCache. The program also ends without a fault."""
    script = (
        "from nixl._api import nixl_agent, nixl_agent_config\n"
        "agent = nixl_agent('a', nixl_agent_config(backends=['UCX']))\n"
        "print(len(agent.get_agent_metadata()))\n"
    )
    ends = {}
    for name, more in {"wheel": {}, "system": with_systems_libibverbs(tmp_path)}.items():
        env = {"PATH": "/usr/bin:/bin", **RC, **more}
        ends[name] = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300, check=False
        )
    print(f"\nwithout the link: {ends['wheel'].stderr[-1500:]}\nwith: {ends['system'].stdout}")
    assert ends["wheel"].returncode != 0
    assert ends["system"].returncode == 0, ends["system"].stderr
