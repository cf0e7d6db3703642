"""Llama 2 and 3.x, SmolLM2, and every other checkpoint that calls itself a Llama."""

from collections.abc import Mapping
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import decoder_config, read_bool


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """`attention_bias` is a bias on all four attention projections."""
    attention_bias = read_bool(hf, "attention_bias", False)
    return decoder_config(
        hf, qkv_bias=attention_bias, output_bias=attention_bias, mlp_bias=read_bool(hf, "mlp_bias", False)
    )
