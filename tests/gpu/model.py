"""Writes models of a given shape: a configuration, a tokenizer with one word per token, and optional random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
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
    # The attention of DeepSeek-V2-Lite. No layer is a mixture of experts, but vLLM requires the number of experts.
    "mla": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 6,
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
        "first_k_dense_replace": 6,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "attention_bias": False,
    },
}
VOCABULARY = 32000
# Number of tokens that can occur in answers. The number is small, so two tokens are rarely almost equally likely, and
# rounding rarely decides between them.
SAID = 64
SEED = 5


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
        _write_weights(folder / "model.safetensors", config, dtype)
    return folder


def token_bytes(folder: Path, element: int) -> int:
    """Returns the bytes of one token's KV in all layers and heads. `element` is the size of one number in bytes."""
    config = json.loads((folder / "config.json").read_text())
    layers = int(config["num_hidden_layers"])
    if "kv_lora_rank" in config:
        return layers * int(config["kv_lora_rank"] + config["qk_rope_head_dim"]) * element
    size = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return layers * 2 * int(config["num_key_value_heads"] * size) * element


def _write_weights(path: Path, config: dict[str, Any], dtype: str) -> None:
    """Writes random weights that make answers depend on KV.

    The weights are large enough for this, and small enough that rounding errors do not grow from layer to layer: the
    outputs of attention and MLP are about as large as their inputs, and attention selects a handful of tokens.
    """
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(SEED)
    to = getattr(torch, dtype)

    def weight(rows: int, columns: int, gain: float) -> Any:
        return (torch.randn(rows, columns, generator=draw) * gain / columns**0.5).to(to)

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = torch.zeros(VOCABULARY, hidden, dtype=to)
    head[3 : 3 + SAID] = weight(SAID, hidden, 2.0)
    tensors = {
        "model.embed_tokens.weight": weight(VOCABULARY, hidden, 0.5 * hidden**0.5),
        "model.norm.weight": torch.ones(hidden, dtype=to),
        "lm_head.weight": head,
    }
    attention = _latent_attention if "kv_lora_rank" in config else _attention
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        shapes = attention(config) | {
            "mlp.gate_proj": (inner, hidden, 1.0),
            "mlp.up_proj": (inner, hidden, 1.0),
            "mlp.down_proj": (hidden, inner, 1.4),
        }
        tensors |= {f"{base}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if "kv_lora_rank" in config:
            norms["self_attn.kv_a_layernorm"] = config["kv_lora_rank"]
        tensors |= {f"{base}.{name}.weight": torch.ones(size, dtype=to) for name, size in norms.items()}
    save_file(tensors, path, metadata={"format": "pt"})


Shapes = dict[str, tuple[int, int, float]]
"""Matrices by name, each with its rows, columns and gain."""


def _attention(config: dict[str, Any]) -> Shapes:
    hidden, size = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {
        "self_attn.q_proj": (queries, hidden, 1.6),
        "self_attn.k_proj": (keys, hidden, 1.6),
        "self_attn.v_proj": (keys, hidden, 1.5),
        "self_attn.o_proj": (hidden, queries, 1.5),
    }


def _latent_attention(config: dict[str, Any]) -> Shapes:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    return {
        "self_attn.q_proj": (heads * (nope + rope), hidden, 1.6),
        "self_attn.kv_a_proj_with_mqa": (latent + rope, hidden, 1.6),
        "self_attn.kv_b_proj": (heads * (nope + value), latent, 1.5),
        "self_attn.o_proj": (hidden, heads * value, 1.5),
    }
