"""Runs real vLLM on the CPU."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.client import call, complete
from harness.metrics import Metrics, PromptTokens
from harness.ports import free_port
from harness.process import Part, Process
from harness.progress import Progress

# On two cores a start takes 30 s, or about 60 s if another engine starts at the same time. The limit is five times as
# long.
START_BOUND_S = 300.0

# 8192 blocks of 32 tokens: enough for the prompts of the tests, and two engines still fit on a small machine.
KV_CACHE_GIB = 1


@dataclass(frozen=True)
class EngineOptions:
    """The options that differ between instances."""

    name: str
    model: Path
    block_size: int = 32
    batched_tokens: int | None = None
    # The value of --kv-transfer-config. None for an instance without a connector.
    kv_transfer: dict[str, Any] | None = None
    # The core of the first worker's thread; further workers take the next cores. Two engines on one core would slow
    # each other down.
    core: int = 0
    # Number of tensor-parallel workers; each worker is a process.
    workers: int = 1
    # The engine process is a fork of the API server, which halves the start time; see `forked/sitecustomize.py`.
    forked: bool = False
    lora: dict[str, Path] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    more: Sequence[str] = ()
    # The Python of another environment, with another version of vLLM; empty for the environment of the tests.
    python: str = ""


class Engine(Part):
    """One instance. The instance keeps its port when its process restarts.

    `start` returns at once; `wait_for` returns when the instance serves.
    """

    def __init__(self, options: EngineOptions, logs: Path) -> None:
        self.options = options
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._logs = logs

    def start(self) -> None:
        assert self.process is None or not self.process.alive
        options = self.options
        command: list[str | Path] = [
            options.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", options.model, "--served-model-name", "m",
            "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", "float32", "--enforce-eager",
            "--max-model-len", "2048", "--max-num-seqs", "16",
            "--block-size", str(options.block_size),
            # Otherwise a start computes the largest image, to know how much memory an image needs.
            "--skip-mm-profiling",
        ]  # fmt: skip
        if options.batched_tokens is not None:
            command += ["--max-num-batched-tokens", str(options.batched_tokens)]
        if options.kv_transfer is not None:
            command += ["--kv-transfer-config", json.dumps(options.kv_transfer)]
        if options.lora:
            command += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules"]
            command += [f"{name}={folder}" for name, folder in options.lora.items()]
        if options.workers > 1:
            command += ["--tensor-parallel-size", str(options.workers)]
        command += options.more
        env = {
            "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core(options.core + i)) for i in range(options.workers)),
            "OMP_NUM_THREADS": "1",
            # vLLM serves /reset_prefix_cache only in this mode.
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            # vLLM stores responses of /v1/responses only with this setting.
            "VLLM_ENABLE_RESPONSES_API_STORE": "1",
            # The engine must not use the network: it must neither download nor report anything.
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "PYTHONUNBUFFERED": "1",
            **options.env,
        }
        if options.forked:
            path = [str(Path(__file__).with_name("forked")), options.env.get("PYTHONPATH", "")]
            env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
            env["PD_TEST_WORKERS"] = str(options.workers)
        log = self._logs / f"{options.name.replace(' ', '-')}.log"
        self.process = Process(options.name, command, log, env)

    def healthy(self) -> bool:
        try:
            return call(f"{self.url}/health", timeout_s=2.0)[0] == 200
        except OSError:
            return False

    def metrics(self) -> Metrics:
        return Metrics.scrape(f"{self.url}/metrics")

    def prompt_tokens(self) -> PromptTokens:
        return PromptTokens.of(self.metrics())

    def generated_tokens(self) -> int:
        """Returns the number of tokens of all answers so far."""
        return int(self.metrics().sum("vllm:generation_tokens"))

    def skipped(self) -> dict[str, float]:
        """Returns the number of requests that the engine's connector did not transfer, by reason."""
        return self.metrics().by("vllm:pd_sidecar_skipped", "reason")

    def requests(self) -> int:
        """Returns the number of running and waiting requests."""
        metrics = self.metrics()
        return int(metrics.sum("vllm:num_requests_running") + metrics.sum("vllm:num_requests_waiting"))

    def cache_usage(self) -> float:
        """Returns the share of the KV blocks that requests use, from 0 to 1."""
        return self.metrics().sum("vllm:kv_cache_usage_perc")

    def block_tokens(self) -> int:
        """Returns the number of tokens of a block, which vLLM enlarges for models with states."""
        (size,) = self.metrics().by("vllm:cache_config_info", "block_size")
        return int(size)

    def reset_prefix_cache(self, *, external: bool = False) -> None:
        """Empties the engine's own cache. With `external`, also the host memory of an OffloadingConnector."""
        query = "?reset_external=true" if external else ""
        status, text = call(f"{self.url}/reset_prefix_cache{query}", method="POST")
        assert status == 200, text

    def load_adapter(self, name: str, folder: Path) -> None:
        """Loads a LoRA adapter. Requests then use the adapter's name as their model."""
        status, text = call(f"{self.url}/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        assert status == 200, text

    def unload_adapter(self, name: str) -> None:
        status, text = call(f"{self.url}/v1/unload_lora_adapter", {"lora_name": name})
        assert status == 200, text

    def warm_up(self) -> None:
        """Sends one short request, because the first request after a start is slow and would distort a measurement."""
        complete(self.url, [2, 3, 4], max_tokens=2)

    def kill_core(self) -> None:
        """Sends SIGKILL to the process that computes. If `VLLM_KEEP_ALIVE_ON_ENGINE_DEATH` is set, vLLM's API server
        stays alive and answers every request with 500; otherwise the API server ends within some seconds.
        """
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        # A fork has the name of its worker, which runs in the same process.
        cores = [pid for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"VLLM::")]
        assert len(cores) == 1, f"one engine core among the children of {self.process.pid}: {children}"
        os.kill(int(cores[0]), signal.SIGKILL)

    def stage(self) -> str:
        """Returns a short text for people: the current step of the start."""
        assert self.process is not None
        output = self.process.output()
        for sign, stage in _STAGES:
            if sign in output:
                return stage
        return "loading Python modules"


def wait_for(engines: Sequence[Engine], progress: Progress | None = None, bound_s: float = START_BOUND_S) -> None:
    """Returns when `/health` of all engines answers 200.

    Raises `ProcessFailed` if an engine ends, or does not answer within `bound_s`. The error contains the end of the
    log.
    """
    deadline = time.monotonic() + bound_s
    waiting = dict.fromkeys(engines, "")
    while waiting:
        for engine in list(waiting):
            process, name = engine.process, engine.options.name
            assert process is not None
            if engine.healthy():
                del waiting[engine]
                stage = f"ready at {engine.url}"
            else:
                stage = engine.stage()
            if not process.alive:
                raise process.failure(f"ended with exit code {process.exit_code} while starting")
            if time.monotonic() > deadline:
                raise process.failure(f"not healthy after {bound_s:g} s")
            if progress is not None and stage != waiting.get(engine):
                progress.say(f"{name}: {stage}")
            if engine in waiting:
                waiting[engine] = stage
        time.sleep(0.2)


# Lines of vLLM's log, each with the step of the start that it marks. The last step is first.
_STAGES = (
    ("Starting vLLM server", "starting its HTTP server"),
    ("init engine", "engine ready"),
    ("Loading weights took", "taking KV cache memory"),
    ("Starting to load model", "loading the model"),
    ("Initializing a V1 LLM engine", "starting its worker"),
    ("non-default args", "reading its configuration"),
)


def core(index: int) -> int:
    """Returns the `index`th core that this process may use. After the last core, the numbers continue with the first
    core.
    """
    cores = sorted(os.sched_getaffinity(0))
    return cores[index % len(cores)]
