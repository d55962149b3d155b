"""Computes from a model's configuration how many bytes of KV a hand-over moves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class KvBytes:
    """The KV of a model in bytes, all layers together."""

    full: int
    """One token in the layers of full attention."""
    windows: int = 0
    """One token in the layers of a sliding window."""
    window: int = 0
    """The window in tokens."""
    state: int = 0
    """One request's states."""

    @property
    def token(self) -> int:
        """One token in all layers that keep tokens. A chunk in a slot has room for this."""
        return self.full + self.windows

    def moved(self, tokens: int) -> int:
        """The bytes that move for a prompt of `tokens` tokens, of which the decode side has none.

        With windows or states, the decode side computes the last token, and needs what comes before it.
        """
        if not (self.windows or self.state):
            return tokens * self.full
        before = tokens - 1
        return before * self.full + min(before, self.window - 1) * self.windows + self.state


def kv_bytes(model: Path, element: int) -> KvBytes:
    """Reads the model's configuration. `element` is the size of a number in bytes."""
    config = json.loads((model / "config.json").read_text())
    layers = int(config["num_hidden_layers"])
    if "kv_lora_rank" in config:
        return KvBytes(layers * int(config["kv_lora_rank"] + config["qk_rope_head_dim"]) * element)
    size = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    one = 2 * int(config["num_key_value_heads"] * size) * element
    window = int(config.get("sliding_window") or 0)
    kinds = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * layers
    full, windows = (sum(kind in names for kind in kinds) for names in (FULL, WINDOWS))
    return KvBytes(full * one, windows * one, window, (layers - full - windows) * _state(config) * element)


def _state(config: dict[str, Any]) -> int:
    """Returns the number of elements of one layer's state: the inputs of the convolution, and the sum."""
    if "mamba_n_heads" in config:
        inner = config["mamba_n_heads"] * config["mamba_d_head"]
        inputs = (config["mamba_d_conv"] - 1) * (inner + 2 * config["mamba_n_groups"] * config["mamba_d_state"])
        return int(inputs + inner * config["mamba_d_state"])
    if "linear_num_key_heads" not in config:
        return 0
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] * config["linear_value_head_dim"]
    inputs = (config["linear_conv_kernel_dim"] - 1) * (2 * keys + values)
    return int(inputs + values * config["linear_key_head_dim"])


FULL = ("full_attention", "attention")
WINDOWS = ("sliding_attention",)
