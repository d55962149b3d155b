"""Writes small models with random weights: models whose KV has several groups, and others that many people serve.

Each model has the tokenizer of `harness.model`. The standard deviation of the weights is so large that a greedy answer
depends on every group's KV.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from harness.model import MAX_POSITIONS, VOCABULARY, write_tokenizer
from harness.once import written_once

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYERS = 4
WINDOW = 64
TYPES = ("sliding_attention", "full_attention")
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def gpt_oss() -> PretrainedConfig:
    """Layers of full attention and of a sliding window in turn, with sinks and experts."""
    from transformers import GptOssConfig

    return GptOssConfig(
        **COMMON,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=list(TYPES) * (LAYERS // 2),
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": MAX_POSITIONS // 2,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    )


def gemma3() -> PretrainedConfig:
    """Three layers of a sliding window for one of full attention."""
    from transformers import Gemma3TextConfig

    types = ["sliding_attention"] * 3 + ["full_attention"]
    return Gemma3TextConfig(**COMMON, sliding_window=WINDOW, layer_types=types, query_pre_attn_scalar=32)


def qwen3_next() -> PretrainedConfig:
    """Three layers of a gated delta net, which have a state, for one of full attention."""
    from transformers import Qwen3NextConfig

    # vLLM's CPU kernel for this layer reads bfloat16 only.
    return Qwen3NextConfig(
        **{**COMMON, "dtype": "bfloat16"},
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        # Each token uses all experts: a choice between experts would turn a rounding error into another text.
        num_experts=4,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    )


def granite4() -> PretrainedConfig:
    """Three layers of Mamba 2, which have a state, and one of full attention."""
    from transformers import GraniteMoeHybridConfig

    common = {name: value for name, value in COMMON.items() if name != "head_dim"}
    return GraniteMoeHybridConfig(
        **common,
        layer_types=["mamba", "mamba", "attention", "mamba"],
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=256,
        position_embedding_type="nope",
        attention_multiplier=0.2,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_n_groups=1,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
    )


def gemma4() -> PretrainedConfig:
    """Heads of full attention are larger than heads of windows, and the last two layers use the KV of the first two."""
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        **COMMON,
        sliding_window=WINDOW,
        layer_types=list(TYPES) * (LAYERS // 2),
        global_head_dim=64,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCABULARY,
    )


def mistral() -> PretrainedConfig:
    """A sliding window in all layers."""
    from transformers import MistralConfig

    return MistralConfig(**COMMON, sliding_window=WINDOW)


def qwen3_moe() -> PretrainedConfig:
    """Full attention in all layers, and experts."""
    from transformers import Qwen3MoeConfig

    # Each token uses all experts, as in `qwen3_next`.
    return Qwen3MoeConfig(**COMMON, num_experts=4, num_experts_per_tok=4, moe_intermediate_size=64)


MODELS = {
    "gpt-oss": gpt_oss,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "qwen3-next": qwen3_next,
    "granite4": granite4,
    "mistral": mistral,
    "qwen3-moe": qwen3_moe,
}


@written_once
def write_hybrid(folder: Path, model_name: str, std: float = 0.1) -> None:
    """Writes the model `model_name` into `folder`."""
    from transformers import AutoModelForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[model_name]())
    for weights in model.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=std)
    for name, weights in model.named_parameters():
        if name.endswith("A_log"):
            # The default forgets a token after one or two more, so a lost state would hardly change a text.
            torch.nn.init.uniform_(weights, -5.0, -2.0)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            # The default weighs all tokens about equally, so that no single token would matter.
            torch.nn.init.constant_(weights, 2.0)
    model.save_pretrained(folder)
