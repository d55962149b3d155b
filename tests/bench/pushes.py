"""Measures pushes of 64 and 512 MiB through two sidecars, against raw NIXL writes that are prepared once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from harness.ports import free_port

from bench.figures import Figures, Row, median
from bench.sidecars import EXAMPLES, PAUSE_US, sidecars

MIB = 1 << 20

# Number of alternations between the sidecars and the baseline, and number of rounds per alternation.
TURNS = 5
ROUNDS = 8


def measure(figures: Figures, folder: Path, logs: Path) -> None:
    for total, chunk in ((64, 1), (512, 16)):
        ours, raw = _alternating("nixl", total, chunk, folder, logs, {})
        ratio = median(ours) / median(raw)
        figures.flat[f"push_nixl_ratio_to_raw_nixl_{total}mib"] = ratio
        figures.flat[f"push_nixl_{total}mib_gb_per_s"] = median(ours)
        figures.rows.append(
            Row(
                f"push over NIXL, {total} MiB in chunks of {chunk} MiB, against raw prepared NIXL writes",
                f"{median(ours):.1f} GB/s",
                f"{median(raw):.1f} GB/s",
                ratio,
                least=0.95,
            )
        )
    _tcp(figures, folder, logs)


def _tcp(figures: Figures, folder: Path, logs: Path) -> None:
    """Measures the built-in TCP transport against NIXL over TCP. If iperf3 is installed, also compares the transport
    with one iperf3 stream.

    The benchmark succeeds if one of the two bounds holds.
    """
    ours, raw = _alternating("tcp", 64, 1, folder, logs, {"UCX_TLS": "tcp", "PD_SIDECAR_NIXL_OVER_TCP": "trusted"})
    ratio = median(ours) / median(raw)
    figures.flat["push_tcp_ratio"] = ratio
    figures.flat["push_tcp_gb_per_s"] = median(ours)
    figures.rows.append(
        Row(
            "push over the built-in TCP, 64 MiB in chunks of 1 MiB, against raw NIXL writes over TCP",
            f"{median(ours):.1f} GB/s",
            f"{median(raw):.1f} GB/s",
            ratio,
            least=0.95,
        )
    )
    if shutil.which("iperf3"):
        stream = _iperf3()
        figures.flat["push_tcp_ratio_to_iperf3"] = median(ours) / stream
        figures.rows.append(
            Row(
                "the same, against one iperf3 stream",
                f"{median(ours):.1f} GB/s",
                f"{stream:.1f} GB/s",
                median(ours) / stream,
                least=1.3,
            )
        )


def _alternating(
    transport: str, total_mib: int, chunk_mib: int, folder: Path, logs: Path, raw_env: dict[str, str]
) -> tuple[list[float], list[float]]:
    """Returns the GB/s of each push, and of the baseline in each turn. The baseline uses its fastest division of the
    bytes.
    """
    ours: list[float] = []
    raw: list[float] = []
    with sidecars(transport, total_mib * MIB, folder, logs) as pair:
        push = {"chunk_bytes": chunk_mib * MIB, "chunks": total_mib // chunk_mib}
        pair.push(**push, rounds=3)
        for _ in range(TURNS):
            _, records = pair.push(**push, rounds=ROUNDS)
            ours += [record["bytes"] / record["push_us"] / 1e3 for record in records]
            raw.append(raw_nixl(total_mib, chunk_mib, raw_env))
    return ours, raw


def raw_nixl(total_mib: float, chunk_mib: float, env: dict[str, str]) -> float:
    """Returns GB/s of raw writes between two processes."""
    return _raw(total_mib, chunk_mib, env, "median_gb_per_s")


def raw_nixl_us(total_mib: float, chunk_mib: float, rounds: int) -> float:
    """Returns the microseconds of one raw write."""
    return _raw(total_mib, chunk_mib, {}, "median_us", rounds)


def _raw(total_mib: float, chunk_mib: float, env: dict[str, str], key: str, rounds: int = ROUNDS) -> float:
    done = subprocess.run(
        [
            EXAMPLES / "raw_write", "--total-mib", str(total_mib), "--chunk-mib", str(chunk_mib),
            "--rounds", str(rounds), "--pause-us", str(PAUSE_US),
        ],
        env={**os.environ, "VIRTUAL_ENV": sys.prefix, **env},
        check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return float(json.loads(done.stdout)[key])


def _iperf3() -> float:
    """Returns GB/s of one iperf3 stream over loopback."""
    port = str(free_port())
    # Without --forceflush, the line that reports the open port would stay in the pipe's buffer.
    server = subprocess.Popen(["iperf3", "-s", "-1", "--forceflush", "-p", port], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        if not any("listening" in line for line in server.stdout):
            raise RuntimeError(f"iperf3 does not listen on port {port}")
        done = subprocess.run(
            ["iperf3", "-c", "127.0.0.1", "-p", port, "-t", "5", "-J"],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
        return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 8e9
    finally:
        server.kill()
        server.wait()
