"""Quantised weights and products with them: every backend against float64, and the formats bit by bit."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.compat import abstract_gpu
from pallas_kernels.quant_matmul import triton
from pallas_kernels.quant_matmul.api import quant_matmul, unsupported
from pallas_kernels.quant_matmul.weight import QuantWeight, dequantise, pack, quantise, unpack

TRITON = Backend("triton", interpret=jax.default_backend() == "cpu")
WEIGHT_ONLY = ("int8", "fp8", "int4")
# (T, K, N, group): one row, ragged tiles of rows and of outputs, SmolLM2's width, a contraction that is split
SIZES = ((1, 64, 48, 32), (5, 576, 64, 64), (33, 96, 40, 32), (70, 256, 130, 128), (3, 1536, 32, 64))
TOLERANCE = {"float32": 2e-6, "bfloat16": 1.5e-2, "float16": 2e-3}
quantise_jit = jax.jit(quantise, static_argnums=(1, 2))


@functools.cache
def product(backend, out_dtype=None):
    return jax.jit(functools.partial(quant_matmul, backend=backend, out_dtype=out_dtype))


def normal(shape, seed, dtype=jnp.float32, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)


@pytest.mark.parametrize("backend", [REFERENCE, TRITON], ids=lambda backend: backend.name)
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), sizes=st.sampled_from(SIZES), seed=st.integers(0, 2**16))
def test_product_is_that_with_the_dequantised_weight(backend, scheme, data, sizes, seed):
    num_tokens, num_inputs, num_outputs, group = sizes
    # Interpreting is slow to compile: each size has one dtype.
    dtype = ("float32", "bfloat16", "float16")[(SIZES.index(sizes) + WEIGHT_ONLY.index(scheme)) % 3]
    if scheme == "int4" and group == 128:
        dtype = "bfloat16"
    scale = data.draw(st.sampled_from([1e-2, 1.0, 30.0]))
    weight = quantise_jit(normal((num_inputs, num_outputs), seed, scale=num_inputs**-0.5), scheme, group)
    x = normal((num_tokens, num_inputs), seed + 1, dtype, scale)
    found = product(backend)(x, weight)
    assert found.dtype == x.dtype and found.shape == (num_tokens, num_outputs)
    truth = np.asarray(x, np.float64) @ np.asarray(dequantise(weight, jnp.float32), np.float64)
    size = np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True)
    assert (np.abs(np.asarray(found, np.float64) - truth) <= TOLERANCE[dtype] * size).all()


@pytest.mark.parametrize("backend", [REFERENCE, TRITON], ids=lambda backend: backend.name)
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_rows_do_not_depend_on_the_rows_beside_them(backend, scheme):
    weight = quantise(normal((128, 48), 0), scheme, 32)
    x = normal((9, 128), 1, jnp.bfloat16)
    poisoned = x.at[4].set(jnp.nan)
    clean = np.arange(9) != 4
    found = product(backend, jnp.float32)(poisoned, weight)
    np.testing.assert_array_equal(found[clean], product(backend, jnp.float32)(x, weight)[clean])
    assert found.dtype == jnp.float32 and np.isnan(found[4]).all()


def test_shares_of_a_split_contraction_sum_to_the_whole():
    x, weight = normal((2, 1536), 0), quantise(normal((1536, 32), 1), "int4", 64)
    whole = triton.Config(block_m=16, block_n=32, block_k=64, num_splits=1, num_warps=4, num_stages=2)
    run = functools.partial(
        triton.quant_matmul, x, weight, out_dtype=x.dtype, backend=Backend("triton", interpret=True)
    )
    expected = run(config=whole)
    for splits in (5, 16):  # of 24 blocks: leaves a short share, and empty ones
        split = triton.Config(16, 32, 64, splits, 4, 2)
        np.testing.assert_allclose(run(config=split), expected, rtol=1e-5, atol=1e-4)


def test_dynamic_float8_is_within_the_rounding_of_both_operands():
    x, matrix = normal((7, 128), 0, jnp.bfloat16), normal((128, 24), 1, scale=128**-0.5)
    found = product(REFERENCE, jnp.float32)(x, quantise(matrix, "fp8_dynamic"))
    truth = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
    size = np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True)
    assert np.abs(found - truth).max() < 0.05 * size.max()


@settings(max_examples=25, deadline=None)
@given(
    scheme=st.sampled_from(WEIGHT_ONLY),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    shift=st.sampled_from([0.0, 3.0]),
)
def test_quantised_weight_is_within_half_a_step_of_the_weight(scheme, seed, scale, shift):
    weight = (np.random.default_rng(seed).standard_normal((128, 3, 4)).astype(np.float32) + shift) * np.float32(scale)
    back = np.asarray(dequantise(quantise_jit(jnp.asarray(weight), scheme, 32), jnp.float32))
    assert back.shape == weight.shape
    error = np.abs(back - weight)
    if scheme == "int8":
        bound = np.abs(weight).max(0) / 254 * 1.001
    elif scheme == "fp8":
        bound = np.maximum(np.abs(weight) / 16, np.abs(weight).max(0) * 2**-10 / 448) * 1.001
    else:
        groups = weight.reshape(4, 32, 3, 4)
        step, size = (groups.max(1) - groups.min(1)) / 15, np.abs(groups).max(1)
        rounding = 16 * step * 2**-11 + size * 2**-11 + 16 * 2**-25  # of scale and minimum to float16
        bound = np.repeat(step / 2 + rounding, 32, axis=0).reshape(weight.shape)
    assert (error <= bound).all()


@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_weight_comes_back_exactly(scheme, value):
    weight = jnp.full((64, 8), value)
    np.testing.assert_allclose(dequantise(quantise(weight, scheme, 32), jnp.float32), weight, rtol=1e-6)


@given(seed=st.integers(0, 2**16), group=st.sampled_from([32, 64, 128]))
@settings(max_examples=10, deadline=None)
def test_nibbles_come_back_from_packing(seed, group):
    q = np.random.default_rng(seed).integers(0, 16, (5, 256), dtype=np.uint8)
    packed = np.asarray(pack(jnp.asarray(q), group))
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), group), q)
    output, number, place = 3, 1, 2
    byte = packed[output, number * group // 2 + place]
    assert byte & 15 == q[output, number * group + place]
    assert byte >> 4 == q[output, number * group + group // 2 + place]


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_a_gguf_tensor_of_four_bits_is_an_int4_weight_byte_by_byte(kind):
    quantisation = gguf.GGMLQuantizationType[kind]
    matrix = np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32)  # [N, K], as checkpoints have it
    blocks = gguf.quants.quantize(matrix, quantisation)
    parts = blocks.reshape(6, 4, -1)  # a block: f16 d, in Q4_1 f16 m, then 16 bytes
    d = parts[:, :, :2].copy().view(np.float16)[..., 0].T
    m = parts[:, :, 2:4].copy().view(np.float16)[..., 0].T if kind == "Q4_1" else (-8 * d.astype(np.float32))
    values = parts[:, :, -16:].reshape(6, 64)
    weight = QuantWeight(
        jnp.asarray(values), jnp.asarray(d), jnp.asarray(m, jnp.float16), scheme="int4", group=32, shape=(128, 6)
    )
    expected = gguf.quants.dequantize(blocks, quantisation).T
    np.testing.assert_allclose(dequantise(weight, jnp.float32), expected, rtol=1e-6, atol=1e-6)


def test_weights_take_as_many_bytes_as_their_scheme_says():
    weight = jax.ShapeDtypeStruct((4096, 6, 1024), jnp.bfloat16)
    for scheme, group, bits in (
        ("int8", 64, 8),
        ("fp8", 64, 8),
        ("int4", 32, 5),
        ("int4", 64, 4.5),
        ("int4", 128, 4.25),
    ):
        leaves = jax.tree.leaves(jax.eval_shape(lambda w, s=scheme, g=group: quantise(w, s, g), weight))
        num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        assert num_bytes == pytest.approx(weight.size * bits / 8, rel=2e-3)


@pytest.mark.parametrize(
    ("scheme", "group", "named"),
    [("int3", 64, "int3"), ("int4", 48, "group 48"), ("int4", 16, "group 16"), ("int4", 128, "divide 192")],
)
def test_schemes_and_groups_that_do_not_fit_are_refused_by_name(scheme, group, named):
    with pytest.raises(ValueError, match=named):
        quantise(jnp.ones((192, 8)), scheme, group)


def test_what_triton_cannot_multiply_by_is_said():
    def weight(shape, scheme, group=64):
        return jax.eval_shape(lambda w: quantise(w, scheme, group), jax.ShapeDtypeStruct(shape, jnp.float32))

    backend = Backend("triton")
    assert unsupported(backend, weight((576, 960), "int4", 32), jnp.bfloat16) == ""
    assert "float8" in unsupported(backend, weight((64, 8), "fp8_dynamic"), jnp.bfloat16)
    assert "40 inputs" in unsupported(backend, weight((40, 8), "int8"), jnp.bfloat16)
    assert "groups of 256" in unsupported(backend, weight((512, 8), "int4", 256), jnp.bfloat16)
    assert "overflows" in unsupported(backend, weight((2**16, 2**15 + 64), "int8"), jnp.bfloat16)
    with pytest.raises(ValueError, match="no multiple of 32"):
        quant_matmul(jnp.ones((1, 40)), quantise(jnp.ones((40, 8)), "int8"), backend=backend)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_kernels_lower_for_a_gpu(scheme, dtype):
    matrix = jax.ShapeDtypeStruct((576, 960), jnp.float32)
    weight = jax.eval_shape(lambda w: quantise(w, scheme, 64), matrix)
    for num_tokens in (1, 200):
        x = jax.ShapeDtypeStruct((num_tokens, 576), dtype)
        with abstract_gpu():
            lowered = product(Backend("triton")).trace(x, weight).lower(lowering_platforms=("cuda",))
        assert f"quant_matmul_{scheme}" in lowered.as_text()


@pytest.mark.parametrize("num_tokens", [1, 64, 4096])
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_candidates_fit_the_weight_and_start_with_the_heuristic(scheme, num_tokens):
    matrix = jax.ShapeDtypeStruct((14336, 4096), jnp.bfloat16)
    weight = jax.eval_shape(lambda w: quantise(w, scheme, 128), matrix)
    configs = triton.candidates(num_tokens, weight, jnp.bfloat16, 132)
    assert configs[0] == triton.heuristic(num_tokens, weight, jnp.bfloat16, 132)
    assert len(set(configs)) == len(configs) and all(14336 % config.block_k == 0 for config in configs)
