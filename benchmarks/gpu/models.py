"""The models that are measured: real sizes and random weights, written as a directory that any engine can open."""

import json
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-13B": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "Llama-3-8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
}
FAMILY = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}


def hf_config(name: str, max_position_embeddings: int | None = None) -> dict[str, Any]:
    """config.json of a model. max_position_embeddings: in place of its own; random weights do not mind."""
    config = FAMILY | MODELS[name]
    if max_position_embeddings is not None:
        config["max_position_embeddings"] = max_position_embeddings
    return config


def write_model(directory: Path, name: str, max_position_embeddings: int | None = None) -> Path:
    """A directory with config.json and a tokenizer of one word, for prompts given as token ids."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(name, max_position_embeddings)))
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    absent = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    tokenizer: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": model, **absent}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return directory
