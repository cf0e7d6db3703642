"""Which architectures run: a checkpoint's config.json goes in, its `ModelConfig` and parameter table come out.

A new family is one module with `config_from_hf` (and, where its tensors differ, a table beside it) and one row here.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import UnsupportedModelError
from jaxserve.models import llama, mistral, qwen2, qwen3
from jaxserve.models.config import ModelConfig
from jaxserve.models.hf_config import architecture, shown
from jaxserve.models.params import DecoderParams, decoder_spec
from jaxserve.models.spec import ParamSpec


@dataclass(frozen=True)
class Family:
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    spec: Callable[[ModelConfig], DecoderParams[ParamSpec]] = decoder_spec  # a tree whose leaves are ParamSpec


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(llama.config_from_hf),
    "MistralForCausalLM": Family(mistral.config_from_hf),
    "Qwen2ForCausalLM": Family(qwen2.config_from_hf),
    "Qwen3ForCausalLM": Family(qwen3.config_from_hf),
}


def model_config(hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """The checked config of a checkpoint. Raises `UnsupportedModelError` or `CorruptFileError`.

    hf          config.json
    generation  generation_config.json; its `eos_token_id`, if any, replaces config.json's, as in transformers
    """
    name = architecture(hf)
    if name not in FAMILIES:
        raise UnsupportedModelError(_unsupported_architecture(name, has_code="auto_map" in hf))
    quantization = hf.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedModelError(f"config.json: quantization_config.quant_method={shown(method)} is not supported")
    if generation and generation.get("eos_token_id") is not None:
        hf = {**hf, "eos_token_id": generation["eos_token_id"]}
    return FAMILIES[name].config_from_hf(hf)


def model_spec(config: ModelConfig) -> DecoderParams[ParamSpec]:
    """The parameter table of a model: `DecoderParams` whose leaves are `ParamSpec`."""
    return FAMILIES[config.architecture].spec(config)


def _unsupported_architecture(name: str, has_code: bool) -> str:
    nearest = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.0)[0]
    code = "; the code that ships with the checkpoint (auto_map) is never run" if has_code else ""
    return (
        f"config.json: architectures[0]={shown(name)} is not supported{code}; "
        f"the nearest supported one is {nearest} (all: {', '.join(FAMILIES)})"
    )
