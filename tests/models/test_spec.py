"""One table gives shapes, random parameters and sources that agree with each other."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.registry import FAMILIES, model_config, model_spec
from jaxserve.models.spec import ParamSpec, random_params, shapes, sources

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
}


def table(architecture="LlamaForCausalLM", **keys):
    return model_spec(model_config({"architectures": [architecture], **SIZES, **keys}))


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("keys", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_sources_fill_each_parameter_exactly_once(architecture, keys):
    specs = jax.tree.leaves(table(architecture, **keys))
    assert all(isinstance(spec, ParamSpec) for spec in specs)
    for spec in specs:
        filled = np.zeros(spec.fused_shape, int)
        for source in spec.sources:
            assert filled[source.where].size == math.prod(source.shape)
            filled[source.where] += 1
        assert (filled == 1).all()
    names = [source.name for spec in specs for source in spec.sources]
    assert sorted(sources(table(architecture, **keys))) == sorted(names)  # no tensor is used twice


def test_absent_features_are_zero_length_arrays():
    layer = shapes(table(), jnp.float32).layers[0]
    absent = (layer.qkv_bias, layer.q_norm, layer.k_norm, layer.attn_out_bias, layer.gate_up_bias, layer.down_bias)
    assert {array.shape for array in absent} == {(0,)}
    assert shapes(table(tie_word_embeddings=True), jnp.float32).lm_head.shape == (0,)


def test_layout_is_the_documented_one():
    layer = shapes(table("Qwen2ForCausalLM"), jnp.bfloat16).layers[1]
    assert (layer.qkv.shape, layer.qkv_bias.shape) == ((24, 2, 5, 4), (2, 5, 4))
    assert (layer.attn_out.shape, layer.gate_up.shape, layer.down.shape) == ((24, 24), (24, 2, 20), (20, 24))
    assert layer.qkv.dtype == jnp.bfloat16


def test_random_parameters_have_the_tables_shapes_and_moments():
    spec = table("Qwen3ForCausalLM")
    params = random_params(spec, jnp.bfloat16, seed=3)
    expected = shapes(spec, jnp.bfloat16)
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params) == expected
    assert float(params.layers[0].qkv.astype(jnp.float32).std()) == pytest.approx(24**-0.5, rel=0.1)
    assert (np.asarray(params.final_norm, np.float32) == 1.0).all()


def test_random_parameters_follow_the_seed_and_differ_between_layers():
    spec = table()
    one, same, other = (random_params(spec, jnp.float32, seed=seed) for seed in (1, 1, 2**40))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one.embed, other.embed)
    assert not np.array_equal(one.layers[0].down, one.layers[1].down)
