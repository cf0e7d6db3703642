"""Mistral: a Llama whose layers may all look through one sliding window."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import decoder_config, uniform_windows


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """`sliding_window` null = full attention, missing = 4096 (as Mistral 7B v0.1)."""
    return decoder_config(hf, windows=partial(uniform_windows, default=4096))
