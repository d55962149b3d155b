"""Measures the alloc handshake and the push of a single chunk."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import zmq

from bench import pyzmq_server
from bench.figures import Figures, Row, median, p99
from bench.pushes import raw_nixl_us
from bench.pyzmq_server import AllocRequest, AllocResponse
from bench.sidecars import EXAMPLES, PAUSE_US, sidecars

MIB = 1 << 20
KEYS = 100
TURNS = 5
# This number is below 256, because a sidecar keeps only the records of its last 256 requests.
ROUNDS = 200

# The chunks are so small that the time of their push does not matter.
SMALL_CHUNK = 4096


def measure(figures: Figures, folder: Path, logs: Path) -> None:
    _alloc(figures, folder, logs)
    _one_chunk(figures, folder, logs)


def _alloc(figures: Figures, folder: Path, logs: Path) -> None:
    ours: list[float] = []
    python: list[float] = []
    with sidecars("tcp", 4 * KEYS * SMALL_CHUNK, folder, logs) as pair:
        push = {"chunk_bytes": SMALL_CHUNK, "chunks": KEYS}
        pair.push(**push, rounds=20)
        for _ in range(TURNS):
            _, records = pair.push(**push, rounds=ROUNDS)
            ours += [record["alloc_us"] for record in records]
            python += pyzmq_round_trips(ROUNDS)
    for name, of, most in (("", median, 0.9), ("_p99", p99, 1.0)):
        ratio = of(ours) / of(python)
        figures.flat[f"handshake_{KEYS}_keys{name}_ratio_to_pyzmq"] = ratio
        figures.flat[f"handshake_{KEYS}_keys{name}_us"] = of(ours)
        figures.rows.append(
            Row(
                f"alloc handshake with {KEYS} keys, {of.__name__}, against pyzmq and msgspec on REQ/REP",
                f"{of(ours):.0f} µs",
                f"{of(python):.0f} µs",
                ratio,
                most=most,
            )
        )


def pyzmq_round_trips(rounds: int) -> list[float]:
    """Returns the microseconds of each round trip between two Python processes, with encoding and decoding."""
    server = subprocess.Popen([sys.executable, pyzmq_server.__file__], stdout=subprocess.PIPE, text=True)
    context = zmq.Context()
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        peer = context.socket(zmq.REQ)
        peer.linger = 0
        peer.connect(f"tcp://127.0.0.1:{port}")
        encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(AllocResponse)
        request = AllocRequest(
            keys=[f"meta-llama/Llama-3.1-8B-Instruct@1@0@{key:016x}@bfloat16" for key in range(KEYS)],
            fmt=1,
            shape=[2, 32, 256, 1024],
            dtype="bfloat16",
            last_chunk_toks=256,
            req_id="bench",
            is_last_batch=True,
            total_chunks=KEYS,
        )
        times = []
        for round_ in range(rounds + 20):
            time.sleep(PAUSE_US / 1e6)
            began = time.perf_counter()
            peer.send(encoder.encode(request))
            response = decoder.decode(peer.recv())
            if round_ >= 20:
                times.append((time.perf_counter() - began) * 1e6)
            assert len(response.remote_indexes) == KEYS
        peer.close()
        return times
    finally:
        context.term()
        server.kill()
        server.wait()


def _one_chunk(figures: Figures, folder: Path, logs: Path) -> None:
    """Measures the time from reservation to ready, and the two parts that it must contain: a round trip and a write."""
    ours: list[float] = []
    parts: list[float] = []
    with sidecars("nixl", 4 * MIB, folder, logs) as pair:
        push = {"chunk_bytes": MIB, "chunks": 1}
        pair.push(**push, rounds=20)
        for _ in range(TURNS):
            times, _ = pair.push(**push, rounds=ROUNDS)
            ours += times
            parts.append(zmq_round_trip(ROUNDS) + raw_nixl_us(1, 1, ROUNDS))
    ratio = median(ours) / median(parts)
    figures.flat["push_one_chunk_ratio_to_parts"] = ratio
    figures.flat["push_one_chunk_us"] = median(ours)
    figures.rows.append(
        Row(
            "one chunk of 1 MiB, reserve to ready, against a raw ZeroMQ round trip and a raw NIXL write",
            f"{median(ours):.0f} µs",
            f"{median(parts):.0f} µs",
            ratio,
            most=2.0,
        )
    )


def zmq_round_trip(rounds: int) -> float:
    """Returns the median microseconds of a round trip that uses only the sidecar's ZeroMQ library."""
    done = subprocess.run(
        [EXAMPLES / "zmq_round_trip", str(rounds), "300", "150", str(PAUSE_US)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return median(json.loads(done.stdout))
