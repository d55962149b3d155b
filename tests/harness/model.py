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
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from harness.once import written_once

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

# The token that stands for each part of an image, and the width and height of an image as Llava sees it.
IMAGE_TOKEN = "<image>"
IMAGE_PIXELS = 64
PATCH_PIXELS = 8
IMAGE_TOKENS = (IMAGE_PIXELS // PATCH_PIXELS) ** 2

# Rank and scale of the adapter. Both numbers are so large that the adapter changes the model's answers.
LORA_RANK = 8
LORA_ALPHA = 64


@written_once
def write_model(folder: Path, *, layers: int = LAYERS) -> None:
    """Writes the model into `folder`.

    Layers above the usual number return their input unchanged: they have KV of their own, but do not change the text.
    """
    write_tokenizer(folder)
    _write_weights(folder, layers)


@written_once
def write_gemma(folder: Path) -> None:
    """Writes a Gemma 4, whose layers have heads of two sizes."""
    # Import the module in this function: only this model needs the module, and the import takes seconds.
    from transformers import AutoModelForCausalLM
    from transformers.models.gemma4 import Gemma4TextConfig

    write_tokenizer(folder)
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


@written_once
def write_llava(folder: Path, *, layers: int = LAYERS) -> None:
    """Writes a Llava into `folder`.

    It reads images of any size as `IMAGE_TOKENS` tokens. For text alone it is the model of `write_model`.
    """
    # Import it here: only this model needs it, and the import takes seconds.
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava import LlavaForConditionalGeneration

    write_tokenizer(folder, IMAGE_TOKEN)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_PIXELS,
        patch_size=PATCH_PIXELS,
    )
    text = LlamaConfig(**_text_config(layers))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=2, dtype="float32")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=WEIGHT_STD)
    # vLLM and this version of Transformers have different names for the vision tower's weights.
    tensors = {
        name.replace("model.vision_tower.", "model.vision_tower.vision_model.").removeprefix("model."): value
        for name, value in model.state_dict().items()
        if "language_model" not in name and "lm_head" not in name
    }
    tensors |= {f"language_model.{name}": value for name, value in _weights(layers).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    size = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    _write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": PATCH_PIXELS,
            "vision_feature_select_strategy": "default",
            "image_token": IMAGE_TOKEN,
            "num_additional_image_tokens": 1,
        },
    )


@written_once
def write_lora(folder: Path, seed: int = 1) -> None:
    """Writes a LoRA adapter for the query projections of `write_llava`."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        base = f"base_model.model.model.language_model.layers.{layer}.self_attn.q_proj"
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


def write_tokenizer(folder: Path, *special: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train(
        [str(module.__file__) for module in CORPUS],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>", *special],
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
    save_file(_weights(layers), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(
        folder / "config.json",
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", **_text_config(layers)},
    )


def _weights(layers: int) -> dict[str, torch.Tensor]:
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
    return tensors


def _text_config(layers: int) -> dict[str, Any]:
    return {
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
    }


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
