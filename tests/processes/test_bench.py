"""Runs `pd-bench` against a real proxy and real sidecars, between which scripted engines move real KV."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from harness.kv_engine import LAYOUT, TOKEN_BYTES, KvEngine
from harness.proxy import Proxy
from harness.sidecar import NO_PUSH, ROOT, Sidecar, SidecarOptions

BOUND_S = 60.0
SLOTS = 32


@dataclass
class Front:
    proxy: Proxy
    prefill: KvEngine
    decode: KvEngine


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory, logs: Path) -> Iterator[Front]:
    if NO_PUSH:
        pytest.skip("nothing can be pushed")
    folder = tmp_path_factory.mktemp("bench")
    with ExitStack() as stack:
        proxy = Proxy(logs, ["--call-back-every", "500ms"])
        proxy.start()
        stack.callback(proxy.stop)
        engines = []
        for side, role in (("prefill", "sender"), ("decode", "receiver")):
            options = SidecarOptions(
                role, SLOTS * LAYOUT.chunk_bytes, transport="tcp", proxy=proxy.registration,
                keys={"register_ms": 500, "park_ms": 3000},
            )  # fmt: skip
            sidecar = Sidecar(options, folder, logs)
            engine = KvEngine(side, sidecar.socket)
            options.engine_url = engine.url
            sidecar.start()
            stack.callback(sidecar.stop)
            engine.start()
            stack.callback(engine.stop)
            engines.append(engine)
        proxy.wait_ready()
        yield Front(proxy, *engines)


def start(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pd_sidecar.bench", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def bench(*words: str | Path) -> tuple[int, str, str]:
    """Runs pd-bench. Returns its exit code, its table and its other output."""
    process = start(*words)
    table, other = process.communicate(timeout=BOUND_S)
    return process.returncode, table, other


def servers(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(file.read_text())["servers"]
    return found


def test_a_load_through_the_proxy_and_past_it(front: Front, tmp_path: Path) -> None:
    """The report of two servers agrees with the counts of the proxy and of the engines."""
    moved, alone = front.decode.bytes_checked, len(front.decode.alone)
    code, table, other = bench(
        "run", f"pd={front.proxy.url}", f"plain={front.decode.url}", "--rate", "40", "--number", "30", "--warmup", "0",
        "--prompt-tokens", "300:900", "--answer-tokens", "4:8", "--goal-first", "30s", "--require", "99",
        "--json", tmp_path / "run.json", "--html", tmp_path / "run.html",
    )  # fmt: skip
    assert code == 0, (table, other)
    pd, plain = servers(tmp_path / "run.json")
    for server in (pd, plain):
        assert (server["figures"]["requests"], server["figures"]["failed"]) == (30, 0)
        assert all(sample["first_s"] > 0 and 4 <= sample["answer_tokens"] <= 8 for sample in server["samples"])
    # Both servers got the same lengths.
    lengths = [sorted((s["prompt_tokens"], s["answer_tokens"]) for s in server["samples"]) for server in (pd, plain)]
    assert lengths[0] == lengths[1] and len(set(lengths[0])) > 20
    # All KV of each prompt moved, and the decode engine compared it.
    tokens = sum(sample["prompt_tokens"] for sample in pd["samples"])
    assert front.decode.bytes_checked - moved == tokens * TOKEN_BYTES
    assert pd["figures"]["transfers"] == {"transfers": 30.0, "moved_bytes": tokens * TOKEN_BYTES}
    assert plain["figures"]["transfers"] == {}
    assert len(front.decode.alone) == alone and front.decode.wrong == []
    assert "30, 0, 0" in table and "100.0 %" in table
    assert (tmp_path / "run.html").read_text().count("<svg") == 4


def test_conversations_in_a_closed_loop(front: Front, tmp_path: Path) -> None:
    code, table, other = bench(
        "run", front.proxy.url, "--clients", "3", "--number", "6", "--turns", "3", "--prompt-tokens", "300",
        "--turn-tokens", "40", "--answer-tokens", "5", "--json", tmp_path / "run.json", "--quiet",
    )  # fmt: skip
    assert (code, other) == (0, ""), table
    (server,) = servers(tmp_path / "run.json")
    assert [turn["requests"] for turn in server["figures"]["turns"]] == [6, 6, 6]
    # Each prompt has the earlier prompt, the answer and the new message.
    for sample in server["samples"]:
        assert sample["prompt_tokens"] == 300 + sample["turn"] * (5 + 40)
    assert "turn 3: time to first token" in table


@pytest.mark.parametrize("kind", ["mooncake", "sharegpt"])
def test_a_trace(front: Front, tmp_path: Path, kind: str) -> None:
    if kind == "mooncake":
        entries: list[dict[str, Any]] = [
            {"timestamp": 100 * n, "input_length": 700, "output_length": 3, "hash_ids": [1, n]} for n in range(5)
        ]
        words = ["--arrivals", "trace", "--speed", "2"]
    else:
        messages = [{"role": "user", "content": "hello " * 60}, {"role": "assistant", "content": "hi there"}]
        entries = [{"messages": messages * 2}] * 5
        words = ["--clients", "2"]
    (tmp_path / "trace.jsonl").write_text("\n".join(json.dumps(each) for each in entries))
    moved = front.decode.bytes_checked
    code, table, other = bench(
        "run", front.proxy.url, "--trace", tmp_path / "trace.jsonl", *words, "--json", tmp_path / "run.json"
    )
    assert code == 0, (table, other)
    (server,) = servers(tmp_path / "run.json")
    samples = server["samples"]
    if kind == "mooncake":
        assert [(s["prompt_tokens"], s["answer_tokens"]) for s in samples] == [(700, 3)] * 5
        starts = sorted(sample["start_s"] for sample in samples)
        # A request is never early: the last request of the trace comes after 400 ms, at twice the speed.
        assert starts[-1] >= 0.2
    else:
        assert [turn["requests"] for turn in server["figures"]["turns"]] == [5, 5]
    assert front.decode.bytes_checked > moved and front.decode.wrong == []


def test_ctrl_c_gives_the_report_of_what_has_ended(front: Front, tmp_path: Path) -> None:
    front.decode.token_s = 0.05
    process = start(
        "run", front.proxy.url, "--clients", "2", "--duration", "10m", "--prompt-tokens", "100",
        "--answer-tokens", "20", "--warmup", "0", "--json", tmp_path / "run.json", "--html", tmp_path / "run.html",
    )  # fmt: skip
    try:
        done, deadline = len(front.proxy.records()), time.monotonic() + BOUND_S
        while len(front.proxy.records()) < min(256, done + 4):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        table, other = process.communicate(timeout=BOUND_S)
    finally:
        front.decode.token_s = 0.0
        process.kill()
    assert process.returncode == 130, other
    saved = json.loads((tmp_path / "run.json").read_text())
    figures = saved["servers"][0]["figures"]
    assert saved["interrupted"] and figures["requests"] >= 2 and figures["failed"] == 0 and figures["unfinished"] >= 1
    assert "interrupted" in (tmp_path / "run.html").read_text() and "interrupted" in other
    assert f"{figures['requests']}, 0, {figures['unfinished']}" in table


def test_failures_are_counted_and_named(front: Front, tmp_path: Path) -> None:
    """The proxy knows no such path."""
    url = f"{front.proxy.url}/nothing"
    code, table, _ = bench("run", url, "--model", "m", "--number", "3", "--json", tmp_path / "run.json")
    assert code == 1
    figures = servers(tmp_path / "run.json")[0]["figures"]
    assert (figures["requests"], figures["failed"]) == (3, 3)
    assert "3 times: HTTP 404" in table and "not_found" in table
