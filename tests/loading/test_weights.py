"""Loading is strict, keeps every value, and never holds the model on the host."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.errors import WeightMismatchError
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.loading.weights import dummy_params, load_params, param_shapes
from jaxserve.models.registry import model_config, model_spec
from jaxserve.models.spec import sources


def load(directory, dtype=jnp.float32, **options):
    checkpoint = open_checkpoint(str(directory))
    return load_params(checkpoint, model_config(checkpoint.hf_config), dtype, **options)


class InMemory:
    """A checkpoint that counts what is read of it."""

    path = "memory"
    hf_config: dict = {}
    generation_config: dict = {}
    tokenizer_source: dict = {}

    def __init__(self, tensors, extra_names=()):
        self.tensors, self.extra_names, self.reads = tensors, list(extra_names), []

    def names(self):
        return [*self.tensors, *self.extra_names]

    def shape(self, name):
        return self.tensors[name].shape

    def nbytes(self, name):
        return self.tensors[name].nbytes

    def read(self, name):
        self.reads.append(name)
        return self.tensors[name]


def refused(hf_config, tensors, *says, extra_names=()):
    checkpoint = InMemory(tensors, extra_names)
    with pytest.raises(WeightMismatchError) as caught:
        load_params(checkpoint, model_config(hf_config), jnp.float32)
    assert checkpoint.reads == []  # refused before anything was read
    message = str(caught.value)
    assert "\n" not in message
    for text in says:
        assert text in message


def test_fused_parameters_hold_the_checkpoints_values_where_documented(write, tensors):
    params = load(write(tensors))
    layer = params.layers[1]
    x = np.random.default_rng(1).normal(size=16).astype(np.float32)
    qkv = np.einsum("d,dkge->kge", x, layer.qkv)
    for head in range(4):
        expected = (tensors["model.layers.1.self_attn.q_proj.weight"] @ x).reshape(4, 4)[head]
        np.testing.assert_allclose(qkv[head // 2, head % 2], expected, atol=1e-5)
    for place, name in ((2, "k_proj"), (3, "v_proj")):
        expected = (tensors[f"model.layers.1.self_attn.{name}.weight"] @ x).reshape(2, 4)
        np.testing.assert_allclose(qkv[:, place], expected, atol=1e-5)
    for place, name in ((0, "gate_proj"), (1, "up_proj")):
        np.testing.assert_array_equal(layer.gate_up[:, place], tensors[f"model.layers.1.mlp.{name}.weight"].T)
    np.testing.assert_array_equal(layer.down, tensors["model.layers.1.mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(layer.attn_out, tensors["model.layers.1.self_attn.o_proj.weight"].T)
    np.testing.assert_array_equal(params.lm_head, tensors["lm_head.weight"])
    np.testing.assert_array_equal(params.embed, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("stored", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_every_stored_dtype_loads_as_every_wanted_dtype(write, tensors, stored, wanted):
    stored_tensors = {name: tensor.astype(stored) for name, tensor in tensors.items()}
    params = load(write(stored_tensors), wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
    for param, name in ((params.layers[0].gate_up[:, 1].T, "mlp.up_proj"), (params.layers[0].down.T, "mlp.down_proj")):
        expected = stored_tensors[f"model.layers.0.{name}.weight"].astype(wanted)
        np.testing.assert_array_equal(np.asarray(param), expected)


def test_loaded_and_dummy_parameters_have_the_announced_shapes(write, tensors, hf_config):
    config = model_config(hf_config)
    expected = param_shapes(config, jnp.bfloat16)
    for params in (load(write(tensors), jnp.bfloat16), dummy_params(config, jnp.bfloat16)):
        assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params) == expected


def test_an_unknown_tensor_is_refused_by_name_and_shape(hf_config, tensors):
    extra = {"model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}
    refused(hf_config, tensors | extra, "unknown model.layers.0.self_attn.q_proj.bias [16]")


def test_a_missing_tensor_is_refused_by_name_and_shape(hf_config, tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    refused(hf_config, tensors, "missing model.layers.1.mlp.up_proj.weight [24, 16]")


def test_a_layer_too_many_is_refused(hf_config, tensors):
    refused(hf_config | {"num_hidden_layers": 1}, tensors, "unknown model.layers.1.", "and 4 more")


def test_a_duplicate_tensor_is_refused_by_name(hf_config, tensors):
    refused(hf_config, tensors, "duplicate model.norm.weight", extra_names=["model.norm.weight"])


def test_a_misshapen_tensor_is_refused_with_both_shapes(hf_config, tensors):
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].T.copy()
    refused(hf_config, tensors, f"misshapen {name} is [16, 8]", "asks for [8, 16]")


def test_every_problem_is_reported_at_once(hf_config, tensors):
    tensors["surprise"] = tensors.pop("model.norm.weight")
    refused(hf_config, tensors, "missing model.norm.weight [16]", "unknown surprise [16]")


def test_stored_rotary_frequencies_are_ignored(hf_config, tensors):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    tensors["model.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    checkpoint = InMemory(tensors)
    load_params(checkpoint, model_config(hf_config), jnp.float32)
    assert not any("inv_freq" in name for name in checkpoint.reads)


def test_a_tied_config_wins_over_a_stored_head(hf_config, tensors):
    checkpoint = InMemory(tensors)
    params = load_params(checkpoint, model_config(hf_config | {"tie_word_embeddings": True}), jnp.float32)
    assert params.lm_head.shape == (0,)
    assert "lm_head.weight" not in checkpoint.reads


def test_an_untied_config_without_a_head_is_refused(hf_config, tensors):
    del tensors["lm_head.weight"]
    refused(hf_config, tensors, "missing lm_head.weight [40, 16]")


def test_progress_counts_every_byte_once(write, tensors):
    calls = []
    load(write(tensors), progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert calls[0] == (0, total) and calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(calls) > 10


def test_parameters_go_to_the_device_that_was_asked_for(write, tensors, hf_config):
    device = jax.devices()[-1]
    sharding = jax.sharding.SingleDeviceSharding(device)
    for placement in (device, sharding):
        params = load(write(tensors), placement=placement)
        dummy = dummy_params(model_config(hf_config), jnp.float32, placement=placement)
        assert {leaf.sharding for leaf in jax.tree.leaves((params, dummy))} == {sharding}


def test_host_memory_while_loading_stays_near_one_layer(write, hf_config, monkeypatch):
    def put_on_device_with_memory_of_its_own(array, placement):
        return jnp.copy(device_put(array, placement))  # the CPU backend itself would keep host arrays as parameters

    device_put = jax.device_put
    monkeypatch.setattr(jax, "device_put", put_on_device_with_memory_of_its_own)
    config = hf_config | {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 24}
    shapes = param_shapes(model_config(config), jnp.float32)
    layer_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes.layers[0]))
    needed = sources(model_spec(model_config(config)))
    directory = write({name: np.ones(source.shape, np.float32) for name, source in needed.items()}, config=config)
    load(directory)  # imports and compiled programs are not what is measured
    tracemalloc.start()
    try:
        params = load(directory)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(params.layers) == 24
    assert peak < 2 * layer_bytes


def test_dummy_parameters_follow_the_seed(hf_config):
    config = model_config(hf_config)
    one, same, other = (dummy_params(config, jnp.float32, seed) for seed in (5, 5, 6))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one.embed, other.embed)
    wider = dataclasses.replace(config, vocab_size=80)
    assert dummy_params(wider, jnp.float32).embed.shape == (80, 16)
