#!/usr/bin/env python3
"""Records the inputs and the outputs of the state machines of two sidecars, between two real vLLM instances.

The recordings go to `protocol/fixtures/traces`, where a test of the protocol crate replays them. Run this script after
an intended change of the machines' behaviour: `.venv/bin/python tests/record_traces.py`.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from harness.client import Stream  # noqa: E402
from harness.model import write_model  # noqa: E402
from harness.pair import CHUNK_BYTES, PairOptions, pair_of  # noqa: E402
from harness.process import ended_by_signals  # noqa: E402
from harness.progress import Progress  # noqa: E402

TRACES = ROOT / "protocol" / "fixtures" / "traces"
LOGS = ROOT / "target" / "trace-logs"


def main() -> None:
    LOGS.mkdir(parents=True, exist_ok=True)
    TRACES.mkdir(parents=True, exist_ok=True)
    options = PairOptions(write_model(ROOT / "target" / "model"), LOGS)
    with ended_by_signals(), pair_of(options, Progress()) as pair:
        # Use a small receive buffer, so that the recordings also contain the window: chunks that get their slots later.
        for sidecar in (pair.receiver, pair.sender):
            sidecar.stop()
            name = sidecar.options.role
            sidecar.options.flags = ["--trace", str(TRACES / f"{name}.jsonl")]
        pair.receiver.options.buffer_bytes = 4 * CHUNK_BYTES
        for sidecar in (pair.receiver, pair.sender):
            sidecar.start()
        pair.wait_sidecars()
        prompts = [[(7 * i + 3 * n) % 2000 + 2 for i in range(n)] for n in (1, 20, 300, 700, 1200, 1500)]
        for prompt in prompts:
            pair.complete(prompt, max_tokens=4)
        # Send a request with a partial prefix hit on the decode side, then several requests at once.
        pair.complete(prompts[3] + prompts[2], max_tokens=4)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda n: pair.complete([n + 2] * (200 * n), max_tokens=4), range(1, 7)))
        # Let a client leave while its prompt is prefilled.
        body = {"prompt": [9] * 1500, "max_tokens": 4, "stream": True}
        with Stream(f"{pair.proxy.url}/v1/completions", body):
            pass
        pair.wait_empty()
    for path in sorted(TRACES.glob("*.jsonl")):
        # Keys and layouts contain the model's path. Replace the path, because it differs on every machine.
        path.write_text(path.read_text().replace(str(options.model), "tiny-model"))
        sys.stdout.write(f"{path.relative_to(ROOT)}: {len(path.read_text().splitlines())} lines\n")


if __name__ == "__main__":
    main()
