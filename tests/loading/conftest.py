"""Synthetic checkpoints, written without torch from the model's own table of tensors."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxserve.models.registry import model_config, model_spec
from jaxserve.models.spec import sources


@pytest.fixture
def hf_config():
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    }


@pytest.fixture
def tensors(hf_config):
    """Every tensor of `hf_config`, by Hugging Face name."""
    rng = np.random.default_rng(0)
    needed = sources(model_spec(model_config(hf_config)))
    return {name: rng.normal(size=source.shape).astype(np.float32) for name, source in needed.items()}


@pytest.fixture
def write(tmp_path, hf_config):
    """write(tensors) -> directory with one file; write(*shards) -> with an index (or the `weight_map` given)."""

    def write(*shards, weight_map=None, config=None, directory=tmp_path):
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(hf_config if config is None else config))
        if len(shards) == 1 and weight_map is None:
            save_file(shards[0], directory / "model.safetensors")
            return directory
        shard_of = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(shard, directory / file)
            shard_of |= dict.fromkeys(shard, file)
        index = {"metadata": {}, "weight_map": shard_of if weight_map is None else weight_map(shard_of)}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    return write
