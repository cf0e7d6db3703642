"""Qwen2 and Qwen2.5: a Llama with a bias on q, k and v, and optionally a sliding window in the upper layers."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import decoder_config, upper_layer_windows


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """The bias is part of the architecture, config.json has no key for it."""
    return decoder_config(hf, windows=upper_layer_windows, qkv_bias=True)
