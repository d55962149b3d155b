"""Writes a Llama model with 3.4 million random weights and its own tokenizer, without any download.

The model is small enough for two cores. The standard deviation of the weights (0.2) is so large that a greedy answer
depends on every part of its prompt: wrong KV anywhere changes the text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import textwrap
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LAYERS = 4
HIDDEN = 256
HEADS = 4
KV_HEADS = 2
HEAD_SIZE = 64
INTERMEDIATE = 512
VOCABULARY = 2048
MAX_POSITIONS = 8192
WEIGHT_STD = 0.2

# Bytes of one token's K and V in all layers, in float32.
KV_BYTES_PER_TOKEN = 2 * LAYERS * KV_HEADS * HEAD_SIZE * 4

# The tokenizer learns from the source text of these modules, because every Python installation contains them.
CORPUS = (argparse, subprocess, textwrap, os)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

# Rank and scale of the adapter. Both numbers are so large that the adapter changes the model's answers.
LORA_RANK = 8
LORA_ALPHA = 64


def write_model(folder: Path, *, layers: int = LAYERS) -> Path:
    """Writes the model into `folder`, unless the folder contains it already, and returns the folder.

    Layers above the usual number return their input unchanged: they have KV of their own, but do not change the text.
    """
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_tokenizer(folder)
        _write_weights(folder, layers)
        done.touch()
    return folder


def write_gemma(folder: Path) -> Path:
    """Writes a Gemma 4, whose layers have heads of two sizes, unless the folder contains it already. Returns the
    folder.
    """
    done = folder / "done"
    if not done.exists():
        # Import the module in this function: only this model needs the module, and the import takes seconds.
        from transformers import AutoModelForCausalLM
        from transformers.models.gemma4 import Gemma4TextConfig

        folder.mkdir(parents=True, exist_ok=True)
        _write_tokenizer(folder)
        config = Gemma4TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            num_global_key_value_heads=KV_HEADS,
            head_dim=HEAD_SIZE,
            global_head_dim=2 * HEAD_SIZE,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=VOCABULARY,
            num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
            sliding_window=512,
            max_position_embeddings=MAX_POSITIONS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            dtype="float32",
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for weights in model.parameters():
            if weights.dim() > 1:
                torch.nn.init.normal_(weights, std=WEIGHT_STD)
        model.save_pretrained(folder)
        done.touch()
    return folder


def write_lora(folder: Path, seed: int = 1) -> Path:
    """Writes a LoRA adapter for the query projections, unless the folder contains it already. Returns the folder."""
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        random = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(LAYERS):
            base = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            tensors[f"{base}.lora_A.weight"] = torch.randn(LORA_RANK, HIDDEN, generator=random) * 0.2
            tensors[f"{base}.lora_B.weight"] = torch.randn(HEADS * HEAD_SIZE, LORA_RANK, generator=random) * 0.2
        save_file(tensors, folder / "adapter_model.safetensors")
        _write_json(
            folder / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": LORA_RANK,
                "lora_alpha": LORA_ALPHA,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": ["q_proj"],
            },
        )
        done.touch()
    return folder


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train(
        [str(module.__file__) for module in CORPUS],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": MAX_POSITIONS,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write_weights(folder: Path, layers: int) -> None:
    random = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * WEIGHT_STD

    tensors = {"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN), "lm_head.weight": weight(VOCABULARY, HIDDEN)}
    for layer in range(layers):
        base = f"model.layers.{layer}"
        weigh = 1.0 if layer < LAYERS else 0.0
        tensors |= {
            f"{base}.self_attn.q_proj.weight": weight(HEADS * HEAD_SIZE, HIDDEN),
            f"{base}.self_attn.k_proj.weight": weight(KV_HEADS * HEAD_SIZE, HIDDEN),
            f"{base}.self_attn.v_proj.weight": weight(KV_HEADS * HEAD_SIZE, HIDDEN),
            f"{base}.self_attn.o_proj.weight": weight(HIDDEN, HEADS * HEAD_SIZE) * weigh,
            f"{base}.mlp.gate_proj.weight": weight(INTERMEDIATE, HIDDEN),
            f"{base}.mlp.up_proj.weight": weight(INTERMEDIATE, HIDDEN),
            f"{base}.mlp.down_proj.weight": weight(HIDDEN, INTERMEDIATE) * weigh,
            f"{base}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{base}.post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
    tensors["model.norm.weight"] = torch.ones(HIDDEN)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_SIZE,
            "max_position_embeddings": MAX_POSITIONS,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "dtype": "float32",
        },
    )


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
