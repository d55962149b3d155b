"""Writes models of a given shape: a configuration, a tokenizer with one word per token, and optional random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu.weights import write_weights

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
OLMO: dict[str, Any] = {
    "architectures": ["OlmoHybridForCausalLM"],
    "model_type": "olmo_hybrid",
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": False,
}
THREE_TO_ONE = ["linear_attention"] * 3 + ["full_attention"]
MLA: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "attention_bias": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "small": {
        **LLAMA,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    # Windows in all layers, as in Mistral 7B v0.1.
    "windows": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "sliding_window": 384,
    },
    # Windows and full attention in turn, as in gpt-oss.
    "mixed": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    },
    # Three gated delta nets for one layer of full attention, as in Qwen3-Next, without a mixture of experts.
    "delta-net": {
        **OLMO,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "layer_types": THREE_TO_ONE * 2,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 8,
    },
    # Mamba 2 beside full attention, as in Granite 4.
    "mamba2": {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "shared_intermediate_size": 2048,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "position_embedding_type": "nope",
        "attention_multiplier": 0.088,
        "layer_types": ["mamba", "mamba", "mamba", "attention"] * 2,
        "mamba_n_heads": 32,
        "mamba_d_head": 64,
        "mamba_n_groups": 1,
        "mamba_d_state": 128,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    },
    # The KV of gpt-oss-20b. A dense MLP with as many active weights takes the place of its experts.
    "gpt-oss-20b": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 2880,
        "intermediate_size": 11520,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
    # The KV and the states of Qwen3-Next-80B-A3B. A dense MLP takes the place of its active experts.
    "qwen3-next-80b": {
        **OLMO,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "layer_types": THREE_TO_ONE * 12,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
    # The latent vectors of DeepSeek-V2-Lite, without its experts.
    "deepseek-v2-lite": {
        **MLA,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 27,
    },
    # The attention of DeepSeek-V2-Lite. No layer is a mixture of experts, but vLLM requires the number of experts.
    "mla": {**MLA, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "first_k_dense_replace": 6},
}
VOCABULARY = 32000


def write_model(folder: Path, shape: str, dtype: str = "bfloat16", *, weights: bool = False) -> Path:
    """Writes a model into `folder` and returns the folder.

    Without `weights`, vLLM makes random weights when it loads the model. These weights differ from 0 by at most 0.001,
    so an answer depends on the last token of its prompt and hardly on KV. The weights also differ for each
    tensor-parallel size.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "pad_token_id": 0,
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
    if weights:
        write_weights(folder / "model.safetensors", config, dtype)
    return folder
