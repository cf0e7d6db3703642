"""Qwen3: norms on every query and key head, an explicit head_dim, and Qwen2's windows."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import decoder_config, read_bool, upper_layer_windows


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """`attention_bias` is a bias on all four attention projections; no published Qwen3 sets it."""
    attention_bias = read_bool(hf, "attention_bias", False)
    return decoder_config(
        hf,
        windows=upper_layer_windows,
        default_head_dim=128,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
    )
