"""Writes random weights that make answers depend on KV.

The weights are large enough for this, and small enough that rounding errors do not grow from layer to layer: the
outputs of attention and MLP are about as large as their inputs, and attention selects a handful of tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Number of tokens that can occur in answers. The number is small, so two tokens are rarely almost equally likely, and
# rounding rarely decides between them.
SAID = 64
SEED = 5

Shapes = dict[str, tuple[int, int, float]]
"""Matrices by name, each with its rows, columns and gain."""


def write_weights(path: Path, config: dict[str, Any], dtype: str) -> None:
    """Writes the weights of a model with this configuration into the file `path`."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(SEED)
    to = getattr(torch, dtype)

    def weight(rows: int, columns: int, gain: float) -> Any:
        return (torch.randn(rows, columns, generator=draw) * gain / columns**0.5).to(to)

    def vector(size: int, low: float, high: float) -> Any:
        return (torch.rand(size, generator=draw) * (high - low) + low).to(to)

    hidden, words = config["hidden_size"], config["vocab_size"]
    head = torch.zeros(words, hidden, dtype=to)
    head[3 : 3 + SAID] = weight(SAID, hidden, 2.0)
    tensors = {
        "model.embed_tokens.weight": weight(words, hidden, 0.5 * hidden**0.5),
        "model.norm.weight": torch.ones(hidden, dtype=to),
        "lm_head.weight": head,
    }
    kinds = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
    for layer, kind in enumerate(kinds):
        base = f"model.layers.{layer}"
        shapes = _mlp(config)
        norms = dict.fromkeys(_norms(config, kind), (hidden, 1.0))
        if kind == "linear_attention":
            shapes |= _delta_net(config)
            values = config["linear_value_head_dim"]
            norms["linear_attn.o_norm"] = (values, 1.0)
            heads = config["linear_num_value_heads"]
            tensors[f"{base}.linear_attn.A_log"] = vector(heads, -5.0, -2.0)
            tensors[f"{base}.linear_attn.dt_bias"] = vector(heads, 0.5, 1.0)
            sizes = _delta_net_sizes(config)
            for name, size in zip("qkv", (sizes[0], sizes[0], sizes[1]), strict=True):
                kernel = weight(size, config["linear_conv_kernel_dim"], 1.5)
                tensors[f"{base}.linear_attn.{name}_conv1d.weight"] = kernel.unsqueeze(1)
        elif kind == "mamba":
            inner, inputs, heads = _mamba_sizes(config)
            shapes |= {
                "mamba.in_proj": (inner + inputs + heads, hidden, 1.0),
                "mamba.out_proj": (hidden, inner, 1.5),
            }
            norms["mamba.norm"] = (inner, 1.0)
            tensors[f"{base}.mamba.A_log"] = vector(heads, -3.0, 0.0)
            tensors[f"{base}.mamba.dt_bias"] = vector(heads, -3.0, -1.0)
            tensors[f"{base}.mamba.D"] = vector(heads, 0.5, 1.0)
            tensors[f"{base}.mamba.conv1d.weight"] = weight(inputs, config["mamba_d_conv"], 1.5).unsqueeze(1)
            tensors[f"{base}.mamba.conv1d.bias"] = vector(inputs, -0.1, 0.1)
        elif "kv_lora_rank" in config:
            shapes |= _latent_attention(config)
            norms["self_attn.kv_a_layernorm"] = (config["kv_lora_rank"], 1.0)
        else:
            shapes |= _attention(config)
            if config["model_type"] == "olmo_hybrid":
                # These norms set the sizes of queries and keys, whatever the gain of the matrices is.
                norms["self_attn.q_norm"] = (hidden, 1.6)
                norms["self_attn.k_norm"] = (shapes["self_attn.k_proj"][0], 1.6)
        tensors |= {f"{base}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
        tensors |= {
            f"{base}.{name}.weight": torch.full((size,), value, dtype=to) for name, (size, value) in norms.items()
        }
    save_file(tensors, path, metadata={"format": "pt"})


def _norms(config: dict[str, Any], kind: str) -> tuple[str, str]:
    if config["model_type"] == "olmo_hybrid" and kind != "linear_attention":
        return "post_attention_layernorm", "post_feedforward_layernorm"
    return "input_layernorm", "post_attention_layernorm"


def _mlp(config: dict[str, Any]) -> Shapes:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    if "mamba_n_heads" in config:
        return {
            "shared_mlp.input_linear": (2 * inner, hidden, 1.0),
            "shared_mlp.output_linear": (hidden, inner, 1.4),
        }
    return {
        "mlp.gate_proj": (inner, hidden, 1.0),
        "mlp.up_proj": (inner, hidden, 1.0),
        "mlp.down_proj": (hidden, inner, 1.4),
    }


def _attention(config: dict[str, Any]) -> Shapes:
    hidden = config["hidden_size"]
    size = config.get("head_dim", hidden // config["num_attention_heads"])
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


def _delta_net_sizes(config: dict[str, Any]) -> tuple[int, int]:
    """Returns the rows of all keys and of all values."""
    return (
        config["linear_num_key_heads"] * config["linear_key_head_dim"],
        config["linear_num_value_heads"] * config["linear_value_head_dim"],
    )


def _delta_net(config: dict[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys, values = _delta_net_sizes(config)
    return {
        "linear_attn.q_proj": (keys, hidden, 1.0),
        "linear_attn.k_proj": (keys, hidden, 1.0),
        "linear_attn.v_proj": (values, hidden, 1.5),
        "linear_attn.g_proj": (values, hidden, 1.0),
        "linear_attn.a_proj": (heads, hidden, 0.5),
        "linear_attn.b_proj": (heads, hidden, 0.5),
        "linear_attn.o_proj": (hidden, values, 1.5),
    }


def _mamba_sizes(config: dict[str, Any]) -> tuple[int, int, int]:
    """Returns the width of the values, the width of the convolution's inputs, and the number of heads."""
    inner = config["mamba_n_heads"] * config["mamba_d_head"]
    return inner, inner + 2 * config["mamba_n_groups"] * config["mamba_d_state"], config["mamba_n_heads"]
