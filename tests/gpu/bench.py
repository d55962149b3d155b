#!/usr/bin/env python3
"""Measures hand-overs between two GPUs, for this project and for the baselines: `make gpu-bench`.

The script writes gpu-bench.json and gpu-bench.md, the table of docs/benchmarks.md, after each step. All engines run at
the same time, but only one stack gets requests at a time. With fewer than two GPUs and without `--gpus`, the exit code
is 77. With `--cpu` the script runs on the CPU with a small model, only to test itself: its figures then mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import shlex
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness.engine import wait_for
from harness.process import ended_by_signals
from harness.progress import Progress
from harness.sidecar import ROOT

from gpu import measure, report
from gpu.baselines import STACKS
from gpu.model import write_model
from gpu.setting import WIRES, Setting, gpus, versions
from gpu.stacks import FirstOfPrefill, Ours, Pair, Stack
from gpu.tpot import tpot

# The order of the steps. Loads under which a stack may hang are last, because later steps leave out a stack that hangs.
STEPS = ("latency", "tpot", "poisson", "burst", "throughput", "many", "wires")
SKIPPED = 77
# Before each of these steps, the stacks of --renew restart, so that their buffers are empty.
RENEWED = ("poisson", "burst")


def main() -> int:
    options = arguments()
    found = gpus()
    if not options.cpu and len(found) < 2 and options.gpus is None:
        print("NOT MEASURED: this needs two GPUs, and there are", len(found), file=sys.stderr)
        return SKIPPED
    setting = make_setting(options)
    shutil.rmtree(setting.logs, ignore_errors=True)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": found or ["no GPU"],
        "versions": versions(),
        "command": shlex.join(["tests/gpu/bench.py", *sys.argv[1:]]),
        "setting": {
            "shape": setting.shape,
            "buffer_bytes": setting.buffer_bytes,
            "kv_bytes": setting.kv_bytes,
            "token_bytes": setting.token_bytes,
            "transport": setting.transport,
        },
    }
    bench = Bench(setting, options, result)
    with ended_by_signals():
        try:
            bench.start()
            asyncio.run(bench.run())
        finally:
            bench.stop()
    print(report.table(result))
    return 0


class Bench:
    """Runs the steps over all stacks."""

    def __init__(self, setting: Setting, options: argparse.Namespace, result: dict[str, Any]) -> None:
        self.setting = setting
        self.options = options
        self.result = result
        self.progress = Progress()
        self.stacks: list[Stack] = [STACKS[name](setting) for name in options.stacks]
        self.prompts = measure.Prompts(options.seed, options.vocabulary)
        self.hung: set[str] = set()
        """Stacks that no longer answer. The next loads leave these stacks out, because each of their requests would
        time out.
        """

    def start(self) -> None:
        """Starts all engines at the same time. Leaves out a baseline that does not start, and reports it."""
        began = time.monotonic()
        for stack in self.stacks:
            stack.start()
        for stack in list(self.stacks):
            self._wait(stack, began)

    def _wait(self, stack: Stack, began: float) -> None:
        try:
            wait_for(stack.engines, self.progress)
            stack.wait()
            self.progress.say(f"{stack.name}: ready after {time.monotonic() - began:.0f} s")
        except Exception as error:
            if stack.name in ("plain", "ours"):
                raise
            self.result.setdefault("left_out", {})[stack.name] = str(error)[-3000:]
            self.progress.say(f"{stack.name}: left out: {str(error)[-1500:]}")
            self.stacks.remove(stack)
            self._stop(stack)

    async def _renew(self) -> None:
        """Restarts the stacks of --renew. Chunks of earlier steps would stay in the buffers and make these stacks
        slower.
        """
        wanted = set(self.options.renew) - set(self.options.idle_only)
        for stack in [stack for stack in self.stacks if stack.name in wanted]:
            began = time.monotonic()
            self._stop(stack)
            stack.start()
            self._wait(stack, began)
            self.hung.discard(stack.name)
            try:
                await measure.warm_up(stack, self.prompts)
            except Exception as error:  # noqa: BLE001 - the results of the other stacks are still useful
                self.progress.say(f"{stack.name}: no answer after its restart: {error!r}"[:300])
                self.hung.add(stack.name)

    async def run(self) -> None:
        steps: dict[str, Callable[[], Awaitable[Any]]] = {
            "latency": self._latency,
            "tpot": lambda: tpot(self._handovers(), self.options.answer, self.prompts, self.progress.say),
            "burst": self._burst,
            "throughput": self._throughput,
            "many": self._many,
            "wires": self._wires,
            "poisson": self._poisson,
        }
        for name in self.options.steps:
            began = time.monotonic()
            try:
                if name in RENEWED:
                    await self._renew()
                self.result[name] = await steps[name]()
                self.hung |= hung(self.result[name])
            except Exception as error:  # noqa: BLE001 - the results of the other steps are still useful
                self.result[name] = {"failure": f"{type(error).__name__}: {error}"[:2000]}
                self.progress.say(f"{name}: {self.result[name]['failure']}")
            self.progress.say(f"{name}: {time.monotonic() - began:.0f} s")
            report.write(self.result, self.options.out)

    def stop(self) -> None:
        for stack in self.stacks:
            self._stop(stack)

    async def _latency(self) -> Any:
        options = self.options
        before = self._decode_tokens()
        found = await measure.latency(self.stacks, options.lengths, options.rounds, self.prompts, self.progress.say)
        if ours := self._ours():
            lengths = [tokens for tokens in options.lengths for _ in range(options.rounds + 1)]
            await asyncio.sleep(1)
            after = self._decode_tokens()
            self.result["moved"] = {
                **measure.moved(ours, self.setting, lengths),
                "decode_tokens_external": after[0] - before[0],
                "decode_tokens_computed": after[1] - before[1],
                "requests": len(lengths),
            }
            self.progress.say(f"moved: {json.dumps(self.result['moved'])}")
            await self._first_of_prefill(ours)
        return found

    async def _first_of_prefill(self, ours: Ours) -> None:
        """Measures the same engines and sidecars again, with the first token from the prefill side."""
        options, first = self.options, FirstOfPrefill(ours)
        stacks = [stack for stack in self.stacks if stack.name == "plain"] + [first]
        with first.started():
            self.result["first_of_prefill"] = await measure.latency(
                stacks, options.lengths, options.rounds, self.prompts, self.progress.say
            )

    async def _throughput(self) -> Any:
        stacks = [stack for stack in self.stacks if stack.name == "plain" or isinstance(stack, Ours)]
        return await measure.throughput(stacks, 40, 4, self.prompts, self.progress.say)

    async def _many(self) -> Any:
        ours = self._ours()
        if ours is None:
            return None
        small = self.options.small_buffer
        ours.restart_sidecars(small)
        found = []
        for at_once in (1, 16):
            found.append(await measure.many(ours, self.setting, small, self.options.many, at_once, self.prompts))
            self.progress.say(f"{self.options.many} prompts, {at_once} at a time: {found[-1]}")
        ours.restart_sidecars(self.setting.buffer_bytes)
        return found

    async def _wires(self) -> Any:
        """Measures this project's stacks over each wire that `auto` did not choose."""
        pairs = [stack for stack in self.stacks if isinstance(stack, Ours)]
        stacks = [stack for stack in self.stacks if stack.name == "plain" or stack in pairs]
        found: dict[str, Any] = {}
        for name, (transport, ucx) in WIRES.items():
            for pair in pairs:
                pair.restart_sidecars(self.setting.buffer_bytes, transport, ucx)
            self.progress.say(f"wire: {name}")
            of = await measure.latency(stacks, self.options.wire_lengths, 2, self.prompts, self.progress.say)
            found[name] = {"latency": of}
            for pair in pairs:
                record = pair.sender.records()[-1]
                rate = round(record["bytes"] / max(record["push_us"], 1) / 1e3, 2)
                found[name][pair.name] = {"record": record, "gb_per_s": rate}
        for pair in pairs:
            pair.restart_sidecars(self.setting.buffer_bytes, self.setting.transport)
        return found

    async def _alone(self) -> float:
        plain = next((stack for stack in self.stacks if stack.name == "plain"), self.stacks[0])
        return await measure.alone(plain, self.prompts)

    async def _burst(self) -> Any:
        return await measure.burst(self._handovers(), 8, 3, await self._alone(), self.prompts, self.progress.say)

    async def _poisson(self) -> Any:
        alone = await self._alone()
        rate = self.options.rate or 0.7 / (alone / 1e3)
        seed, seconds, say = self.options.seed, self.options.seconds, self.progress.say

        def prompts() -> measure.Prompts:
            # Use prompts that no engine has seen before: a prefix cache holds a part of each earlier prompt.
            return measure.Prompts(seed + 1, self.options.vocabulary)

        return await measure.poisson(self._handovers(), rate, alone, seconds, prompts, seed, say)

    def _ours(self) -> Ours | None:
        return next((stack for stack in self.stacks if isinstance(stack, Ours)), None)

    def _handovers(self) -> list[Pair]:
        if self.hung:
            self.progress.say(f"left out, because they no longer answer: {', '.join(sorted(self.hung))}")
        left_out = {"plain", *self.hung, *self.options.idle_only}
        return [cast(Pair, stack) for stack in self.stacks if stack.name not in left_out]

    def _decode_tokens(self) -> tuple[int, int]:
        if (ours := self._ours()) is None:
            return 0, 0
        tokens = ours.decode.prompt_tokens()
        return tokens.external, tokens.computed

    def _stop(self, stack: Stack) -> None:
        for part in stack.parts:
            with contextlib.suppress(Exception):
                part.stop()


def hung(found: Any) -> set[str]:
    """Returns the names of the stacks that had a failed request in this step."""

    def failed(of: dict[str, Any]) -> bool:
        by_length = (part.get("failure") for part in of.values() if isinstance(part, dict))
        return bool(of.get("failed")) or any(by_length)

    stacks = found if isinstance(found, dict) else {}
    return {name for name, of in stacks.items() if isinstance(of, dict) and failed(of)}


def make_setting(options: argparse.Namespace) -> Setting:
    folder = options.out
    if options.cpu:
        from harness.model import write_model as write_small

        return Setting(
            write_small(ROOT / "target" / "model"), "tiny", folder, None, options.buffer, 1 << 30, 2048, block_tokens=32
        )
    pair = options.gpus or (0, 1)
    return Setting(
        write_model(folder / "model", options.shape),
        options.shape,
        folder,
        (pair[0], pair[1]),
        options.buffer,
        kv_bytes=options.kv_bytes,
        utilization=options.utilization,
        engine_flags=tuple(shlex.split(options.engine_flags)),
        transport=options.transport,
        push=options.push,
        prefix_caching=options.prefix_caching,
        sidecar_keys=json.loads(options.sidecar_keys),
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    numbers = lambda text: [int(word) for word in text.split(",")]  # noqa: E731
    parser.add_argument(
        "--out", type=Path, default=ROOT / "target" / "gpu-bench", help="folder for the results and logs"
    )
    stacks = (
        f"stacks to measure, with commas: {', '.join(STACKS)} (other is ours with another --push, router is ours with "
        "the contract of other projects' routers)"
    )
    usual = [name for name in STACKS if name not in ("other", "router")]
    parser.add_argument("--stacks", type=words, default=usual, help=stacks)
    parser.add_argument(
        "--steps", type=words, default=list(STEPS), help=f"steps to run, with commas: {', '.join(STEPS)}"
    )
    parser.add_argument("--gpus", type=numbers, help="ordinals of the prefill GPU and the decode GPU, such as 0,1")
    parser.add_argument("--shape", default="llama-8b", help="shape of the model, from gpu/model.py")
    parser.add_argument(
        "--lengths", type=numbers, default=[512, 2048, 5000, 16000], help="tokens of the prompts in the step latency"
    )
    parser.add_argument("--wire-lengths", type=numbers, default=[2048, 5000], help="the same in the step wires")
    parser.add_argument(
        "--idle-only", type=words, default=[], help="stacks that get no load: the other steps still measure them"
    )
    parser.add_argument(
        "--renew", type=words, default=["lmcache"], help=f"stacks that are restarted before {' and '.join(RENEWED)}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured requests per length in the step latency")
    parser.add_argument("--buffer", type=int, default=16 << 30, help="bytes of each send buffer and landing buffer")
    parser.add_argument("--small-buffer", type=int, default=4 << 30, help="bytes of each buffer in the step many")
    parser.add_argument("--kv-bytes", type=int, default=6 << 30, help="bytes of each engine's KV cache")
    parser.add_argument("--utilization", type=float, default=0.2, help="vLLM's --gpu-memory-utilization")
    parser.add_argument("--many", type=int, default=200, help="number of prompts in the step many")
    parser.add_argument(
        "--rate", type=float, help="prompts per second; by default 70 %% of the rate that prefill can reach"
    )
    parser.add_argument("--seconds", type=float, default=60, help="duration of the step poisson")
    parser.add_argument("--answer", type=int, default=400, help="tokens of each answer in the step tpot")
    parser.add_argument("--load-tokens", type=int, default=5000, help="tokens of each prompt under load")
    parser.add_argument(
        "--no-prefix-caching",
        dest="prefix_caching",
        action="store_false",
        help="start all engines without prefix caches",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the prompts and of their times")
    parser.add_argument("--transport", default="auto", help="the sidecars' transport: auto, cuda_ipc, nixl or tcp")
    parser.add_argument("--push", default="auto", help="auto, layers or step: see the connector's options")
    parser.add_argument("--engine-flags", default="", help="further flags for every engine")
    parser.add_argument("--sidecar-keys", default="{}", help="keys below `sidecar:`, as JSON")
    parser.add_argument(
        "--cpu", action="store_true", help="run on the CPU with a small model, only to test this script"
    )
    options = parser.parse_args()
    options.vocabulary = 2000 if options.cpu else 32000
    measure.LOAD_TOKENS = options.load_tokens
    return options


if __name__ == "__main__":
    sys.exit(main())
