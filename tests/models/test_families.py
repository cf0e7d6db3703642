"""Every supported family equals Hugging Face on tiny random models, from checkpoint to logits, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.loading.weights import load_params
from jaxserve.models.registry import model_config
from pallas_kernels import dispatch

transformers = pytest.importorskip("transformers")

PROMPT = [int(token) for token in np.random.default_rng(7).integers(0, 96, 30)]
TINY = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=64)


def llama(heads=4, kv_heads=2, **options):
    return transformers.LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, **{**TINY, **options})


def rope(kind, **values):
    return {"rope_type": kind, "rope_theta": 10_000.0, **values}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CASES = {
    "llama_multi_head": lambda: llama(4, 4),
    "llama_multi_query": lambda: llama(4, 1),
    "llama_group_of_3_head_dim_6": lambda: llama(6, 2, hidden_size=36),
    "llama_wide_heads": lambda: llama(2, 1, head_dim=24),
    "llama_biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama_tied_gelu": lambda: llama(tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"),
    "llama_rope_linear": lambda: llama(rope_parameters=rope("linear", factor=4.0)),
    "llama_rope_llama3": lambda: llama(rope_parameters=LLAMA3),
    "llama_rope_yarn": lambda: llama(
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16), head_dim=16
    ),
    "mistral_window": lambda: transformers.MistralConfig(
        num_attention_heads=4, num_key_value_heads=2, sliding_window=7, **TINY
    ),
    "mistral_full": lambda: transformers.MistralConfig(
        num_attention_heads=4, num_key_value_heads=2, sliding_window=None, **TINY
    ),
    "qwen2_upper_layers_window": lambda: transformers.Qwen2Config(
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        **TINY,
    ),
    "qwen2_full_tied": lambda: transformers.Qwen2Config(
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, **TINY
    ),
    "qwen3": lambda: transformers.Qwen3Config(num_attention_heads=4, num_key_value_heads=2, head_dim=12, **TINY),
    "qwen3_biases_window_tied": lambda: transformers.Qwen3Config(
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=0,
        tie_word_embeddings=True,
        **TINY,
    ),
}


def load(directory):
    checkpoint = open_checkpoint(str(directory))
    config = model_config(checkpoint.hf_config, checkpoint.generation_config)
    return load_params(checkpoint, config, jnp.float32), config


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_hugging_face(tiny, tmp_path, case):
    model = tiny.save(CASES[case](), tmp_path)
    params, config = load(tmp_path)
    expected = tiny.torch_logits(model, PROMPT)
    assert expected.std() > 0.3  # logits of nearly nothing would equal anything
    np.testing.assert_allclose(tiny.logits(params, config, PROMPT), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["llama_rope_llama3", "qwen3_biases_window_tied"])
def test_chunked_prompt_equals_whole_prompt(tiny, tmp_path, case):
    tiny.save(CASES[case](), tmp_path)
    params, config = load(tmp_path)
    whole = tiny.logits(params, config, PROMPT)
    for chunk in (1, 10):
        np.testing.assert_allclose(tiny.logits(params, config, PROMPT, chunk=chunk), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", ["llama_group_of_3_head_dim_6", "mistral_window"])
def test_paged_kernels_equal_dense_attention(tiny, tmp_path, case):
    tiny.save(CASES[case](), tmp_path)
    params, config = load(tmp_path)
    kernels = dispatch.choose(dispatch.Target("cpu"), config.attention_shape(tiny.page_size, "float32", "float32"))
    paged = tiny.logits(params, config, PROMPT, chunk=10, kernels=kernels)
    np.testing.assert_allclose(paged, tiny.logits(params, config, PROMPT), atol=2e-5, rtol=0)


def test_sharded_checkpoint_loads_the_same_parameters(tiny, tmp_path):
    tiny.save(CASES["llama_biases"](), tmp_path / "one")
    tiny.save(CASES["llama_biases"](), tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load(tmp_path / "one")[0], load(tmp_path / "many")[0]
    jax.tree.map(np.testing.assert_array_equal, one, many)


def test_the_window_changes_logits_only_beyond_it(tiny, tmp_path):
    tiny.save(CASES["mistral_window"](), tmp_path)
    params, config = load(tmp_path)
    full = dataclasses.replace(config, windows=(0,) * config.num_layers)
    difference = np.abs(tiny.logits(params, config, PROMPT) - tiny.logits(params, full, PROMPT)).max(axis=1)
    assert difference[:7].max() == 0.0
    assert difference[-1] > 1e-2


def test_dynamic_rope_equals_hugging_face_on_a_sequence_of_max_model_len(tiny, tmp_path):
    model = tiny.save(llama(rope_parameters=rope("dynamic", factor=2.0), max_position_embeddings=16), tmp_path)
    params, config = load(tmp_path)
    logits = tiny.logits(params, config, PROMPT, max_model_len=len(PROMPT))
    np.testing.assert_allclose(logits, tiny.torch_logits(model, PROMPT), atol=1e-4, rtol=0)
    chunked = tiny.logits(params, config, PROMPT, max_model_len=len(PROMPT), chunk=5)
    np.testing.assert_allclose(chunked, logits, atol=2e-5, rtol=0)


def test_bfloat16_activations_stay_bfloat16_and_logits_are_float32(tiny, tmp_path):
    model = tiny.save(CASES["qwen3"](), tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    config = model_config(checkpoint.hf_config)
    params = load_params(checkpoint, config, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    logits = tiny.logits(params, config, PROMPT)
    expected = tiny.torch_logits(model, PROMPT)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).mean() < 0.1 * expected.std()
