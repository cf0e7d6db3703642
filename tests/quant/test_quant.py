"""Weight-only quantisation of a whole model: what becomes narrow, what it costs, and what the model then says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import ConfigError
from jaxserve.loading.weights import dummy_params, load_params, param_shapes
from jaxserve.models import blocks
from jaxserve.models.registry import model_config, model_spec
from jaxserve.models.spec import sources
from jaxserve.quant.scheme import SCHEMES, UNQUANTISED, Quantisation, narrow
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.quant_matmul.weight import QuantWeight, dequantise

NARROW = [scheme for scheme in SCHEMES if scheme != "none"]
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
LOGIT_ERROR = {"int8": 0.03, "fp8": 0.15, "int4": 0.35}  # of the logits' standard deviation


class InMemory:
    """A checkpoint of random tensors."""

    path = "memory"

    def __init__(self, config):
        draw = np.random.default_rng(0)
        needed = sources(model_spec(config)).items()
        self.tensors = {name: draw.standard_normal(source.shape).astype(np.float32) for name, source in needed}

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def nbytes(self, name):
        return self.tensors[name].nbytes

    def read(self, name):
        return self.tensors[name]


def is_narrow(leaf):
    return isinstance(leaf, QuantWeight)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def widened(params):
    """The same model with float weights: what the quantised one stands for."""

    def wide(leaf):
        return dequantise(leaf, jnp.float32) if is_narrow(leaf) else leaf

    params = jax.tree.map(wide, params, is_leaf=is_narrow)
    return dataclasses.replace(params, lm_head=params.lm_head.T) if params.lm_head.size else params


def mlp_and_projections(params, config, x):
    """Every kind of projection of every layer, and the head."""
    for layer in params.layers:
        qkv = blocks.linear(x, layer.qkv)
        x = x + blocks.linear(qkv[:, :, :2].reshape(len(x), -1), layer.attn_out)
        x = x + blocks.gated_mlp(layer, config, x)
        x = blocks.rms_norm(x, layer.mlp_norm, config.norm_eps)
    head = params.lm_head if params.lm_head.shape[0] else params.embed
    return blocks.linear(x, head, contract=1, out_dtype=jnp.float32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", NARROW)
def test_projections_are_narrow_and_nothing_else(scheme, tied):
    config = model_config(SIZES | {"tie_word_embeddings": tied})
    params = dummy_params(config, jnp.bfloat16, quantisation=Quantisation(scheme))
    for layer in params.layers:
        assert all(is_narrow(leaf) for leaf in (layer.qkv, layer.attn_out, layer.gate_up, layer.down))
        assert layer.qkv.shape == (64, 2, 4, 16) and layer.gate_up.shape == (64, 2, 96)
        assert not is_narrow(layer.attn_norm) and not is_narrow(layer.mlp_norm)
    assert not is_narrow(params.embed) and not is_narrow(params.final_norm)
    assert is_narrow(params.lm_head) != tied


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shapes_promise_what_dummy_and_checkpoint_give(scheme):
    config = model_config(SIZES)
    quantisation = Quantisation(scheme)
    promised = param_shapes(config, jnp.bfloat16, quantisation)
    for params in (
        dummy_params(config, jnp.bfloat16, quantisation=quantisation),
        load_params(InMemory(config), config, jnp.bfloat16, quantisation=quantisation),
    ):
        assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params) == promised


@pytest.mark.parametrize("scheme", NARROW)
def test_checkpoint_is_quantised_as_its_float_parameters_would_be(scheme):
    config, checkpoint = model_config(SIZES), InMemory(model_config(SIZES))
    wide = load_params(checkpoint, config, jnp.float32)
    narrowed = load_params(checkpoint, config, jnp.float32, quantisation=Quantisation(scheme))
    for name in ("qkv", "attn_out", "gate_up", "down"):
        expected = narrow(getattr(wide.layers[1], name), 0, Quantisation(scheme))
        jax.tree.map(np.testing.assert_array_equal, getattr(narrowed.layers[1], name), expected)
    jax.tree.map(np.testing.assert_array_equal, narrowed.lm_head, narrow(wide.lm_head, 1, Quantisation(scheme)))
    np.testing.assert_array_equal(narrowed.embed, wide.embed)


@pytest.mark.parametrize(("scheme", "least", "most"), [("int8", 0.50, 0.53), ("fp8", 0.50, 0.53), ("int4", 0.25, 0.33)])
def test_projections_take_the_promised_share_of_their_bytes(scheme, least, most):
    config = model_config(SIZES | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 1})
    wide, narrowed = (param_shapes(config, jnp.bfloat16, q).layers for q in (UNQUANTISED, Quantisation(scheme)))
    assert least < nbytes(narrowed) / nbytes(wide) < most


@pytest.mark.parametrize("backend", [REFERENCE, Backend("triton", interpret=True)], ids=lambda backend: backend.name)
@pytest.mark.parametrize("scheme", NARROW)
def test_quantised_model_says_what_its_dequantised_weights_say_and_nearly_what_the_model_says(scheme, backend):
    config = model_config(SIZES)
    params = dummy_params(config, jnp.float32)
    quantisation = Quantisation(scheme, backend=backend)
    narrowed = dummy_params(config, jnp.float32, quantisation=quantisation)
    assert narrowed.layers[0].down.backend == backend
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 64)), jnp.float32)
    run = jax.jit(mlp_and_projections, static_argnums=1)
    found = run(narrowed, config, x)
    np.testing.assert_allclose(found, run(widened(narrowed), config, x), rtol=0, atol=2e-5)
    wide = run(params, config, x)
    assert np.abs(found - wide).max() < LOGIT_ERROR[scheme] * 4 * wide.std()
    assert np.abs(found - wide).mean() < LOGIT_ERROR[scheme] * wide.std()
    np.testing.assert_array_equal(found, run(narrowed, config, x))


def test_groups_shorten_until_they_divide_and_else_the_width_is_named():
    assert narrow(jnp.ones((96, 8)), 0, Quantisation("int4")).group == 32
    assert narrow(jnp.ones((8, 128)), 1, Quantisation("int4", group=128)).group == 128
    with pytest.raises(ConfigError, match="48 inputs"):
        narrow(jnp.ones((48, 8)), 0, Quantisation("int4"))


def test_a_weight_that_the_kernel_cannot_take_falls_back_and_says_so(caplog):
    weight = narrow(jnp.ones((40, 24)), 0, Quantisation("int8", backend=Backend("triton", interpret=True)))
    assert weight.backend == REFERENCE
    assert "40 inputs" in caplog.text and "plain JAX" in caplog.text


def test_a_weight_that_a_kernel_asked_for_by_name_cannot_take_is_refused():
    asked = Quantisation("int8", backend=Backend("triton", interpret=True), required=True)
    with pytest.raises(ConfigError, match="matmul_backend=triton .* 40 inputs"):
        narrow(jnp.ones((40, 24)), 0, asked)
