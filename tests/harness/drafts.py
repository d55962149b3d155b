"""Writes a small model and an EAGLE draft of another shape, which often guesses the model's next token.

Most of the time the next token follows from the present one: a row of the output matrix is the embedding of the row's
predecessor in a fixed cycle. The layers of both models add so much that the guess is wrong in a part of the cases, and
which cases these are depends on the draft's KV.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from harness.model import MAX_POSITIONS, VOCABULARY, write_tokenizer
from harness.once import written_once

HIDDEN, INTERMEDIATE, LAYERS = 128, 256, 2
# Standard deviation of what attention adds.
NOISE = 0.2
TARGET_HEADS, TARGET_SIZE = 2, 32
DRAFT_HEADS, DRAFT_SIZE = 1, 64
DRAFT_LAYERS = 1

# Bytes of one token's K and V, in float32.
TARGET_BYTES = 2 * LAYERS * TARGET_HEADS * TARGET_SIZE * 4
DRAFT_BYTES = 2 * DRAFT_LAYERS * DRAFT_HEADS * DRAFT_SIZE * 4


@written_once
def write_target(folder: Path, noise: float = NOISE) -> None:
    """Writes the model into `folder`."""
    random = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": _embedding(random), "model.norm.weight": torch.ones(HIDDEN)}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0).clone()
    for layer in range(LAYERS):
        tensors |= _layer(f"model.layers.{layer}", TARGET_HEADS, TARGET_SIZE, noise, random)
    _write(folder, tensors, LAYERS, TARGET_HEADS, TARGET_SIZE)


@written_once
def write_draft(folder: Path, noise: float = NOISE) -> None:
    """Writes the draft into `folder`."""
    random = torch.Generator().manual_seed(0)
    tensors = {"embed_tokens.weight": _embedding(random)}
    # The draft reads the token's embedding, and ignores the model's hidden state.
    tensors["fc.weight"] = torch.cat((torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)), 1)
    for layer in range(DRAFT_LAYERS):
        tensors |= _layer(f"layers.{layer}", DRAFT_HEADS, DRAFT_SIZE, noise, random)
    # The first layer of an EAGLE draft has no normalisation of its input.
    del tensors["layers.0.input_layernorm.weight"]
    _write(folder, tensors, DRAFT_LAYERS, DRAFT_HEADS, DRAFT_SIZE)


def _embedding(random: torch.Generator) -> torch.Tensor:
    return torch.randn(VOCABULARY, HIDDEN, generator=random)


def _layer(base: str, kv_heads: int, size: int, noise: float, random: torch.Generator) -> dict[str, torch.Tensor]:
    def weight(rows: int, columns: int, std: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) * std

    heads = 2 * kv_heads
    return {
        f"{base}.self_attn.q_proj.weight": weight(heads * size, HIDDEN, 0.2),
        f"{base}.self_attn.k_proj.weight": weight(kv_heads * size, HIDDEN, 0.2),
        f"{base}.self_attn.v_proj.weight": weight(kv_heads * size, HIDDEN, 0.1),
        f"{base}.self_attn.o_proj.weight": weight(HIDDEN, heads * size, noise),
        f"{base}.mlp.gate_proj.weight": weight(INTERMEDIATE, HIDDEN, 0.1),
        f"{base}.mlp.up_proj.weight": weight(INTERMEDIATE, HIDDEN, 0.1),
        f"{base}.mlp.down_proj.weight": weight(HIDDEN, INTERMEDIATE, 0.02),
        f"{base}.input_layernorm.weight": torch.ones(HIDDEN),
        f"{base}.post_attention_layernorm.weight": torch.ones(HIDDEN),
    }


def _write(folder: Path, tensors: dict[str, torch.Tensor], layers: int, kv_heads: int, size: int) -> None:
    write_tokenizer(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "max_position_embeddings": MAX_POSITIONS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
