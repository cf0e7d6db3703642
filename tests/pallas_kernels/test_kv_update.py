"""Writing keys and values into the pool: what is written where, and what is left alone. One body for all backends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compat
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.kv_update.api import update_kv
from pallas_kernels.storage import FLOAT8, KVPool, decode, encode, quantise, quantised, storage_dtype

LAYERS, PAGES, PAGE, HEADS, GROUP = 3, 6, 4, 2, 3
TOKENS = PAGES * PAGE - PAGE  # as many as fit beside the waste page
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
PLATFORM = jax.default_backend()
BACKENDS = [REFERENCE, Backend("triton", interpret=PLATFORM == "cpu")]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
update = jax.jit(update_kv, static_argnames="backend")


def pool_of(dtype, kv_dtype, size=8, seed=0):
    rng = np.random.default_rng(seed)
    shape = (LAYERS * PAGES, PAGE, HEADS, size)
    stored = storage_dtype(kv_dtype, PLATFORM)
    k, v = (encode(jnp.asarray(rng.standard_normal(shape), dtype).astype(kv_dtype), stored) for _ in range(2))
    heads = HEADS if quantised(k) else 0
    scales = [jnp.asarray(rng.uniform(0.5, 2, (*shape[:2], heads)), jnp.float32) for _ in range(2)]
    return KVPool(k, v, *scales)


def values_of(pool, scale, dtype):
    """f32[layers, slots, heads, size] of a pool's contents."""
    values = decode(pool, dtype).astype(jnp.float32)
    if quantised(pool):
        values = values * scale[..., None]
    return np.array(values).reshape(LAYERS, PAGES * PAGE, *pool.shape[2:])


def new_values(tokens, dtype, size=8, seed=1):
    """[tokens, heads, GROUP + 2, size]: queries, key, value."""
    values = np.random.default_rng(seed).standard_normal((tokens, HEADS, GROUP + 2, size))
    return jnp.asarray(values.astype(np.float32), dtype)


def angles(tokens, half, seed=2):
    angle = np.random.default_rng(seed).uniform(-3, 3, (tokens, half)).astype(np.float32)
    return jnp.cos(angle), jnp.sin(angle)


def as_complex(x, half):
    """The pairs (i, i + half) of the first 2 * half dimensions as complex numbers."""
    return x[..., :half] + 1j * x[..., half : 2 * half]


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10, deadline=None)
@given(
    slots=st.lists(st.integers(PAGE, PAGES * PAGE - 1), unique=True, max_size=TOKENS),
    layer=st.integers(0, LAYERS - 1),
    padding=st.sampled_from([-1, 0]),
)
def test_pool_equals_the_old_one_but_for_the_written_slots(backend, dtype, slots, layer, padding):
    qkv = new_values(TOKENS, dtype)
    old = pool_of(dtype, dtype)
    kv_slots = jnp.asarray(slots + [padding] * (TOKENS - len(slots)), jnp.int32)
    q, new = update(old, qkv, *angles(TOKENS, 0), kv_slots, page_offset=jnp.int32(layer * PAGES), backend=backend)
    np.testing.assert_array_equal(q, qkv[:, :, :GROUP].reshape(q.shape))
    for before, after, values in ((old.k, new.k, qkv[:, :, GROUP]), (old.v, new.v, qkv[:, :, GROUP + 1])):
        expected, found = values_of(before, old.k_scale, dtype), values_of(after, new.k_scale, dtype)
        expected[layer, slots] = np.asarray(values, np.float32)[: len(slots)]
        if padding == 0:
            expected[layer, 0] = found[layer, 0]  # padding may leave anything there
        np.testing.assert_array_equal(found, expected)


@EVERY_BACKEND
@pytest.mark.parametrize(("size", "half"), [(8, 4), (8, 2), (6, 3), (6, 1)])  # whole and partial, padded and not
def test_queries_and_keys_are_rotated_on_their_way_and_values_are_not(backend, size, half):
    qkv = new_values(5, jnp.float32, size)
    cos, sin = angles(5, half)
    slots = jnp.asarray([4, 23, 9, 10, 17], jnp.int32)
    q, new = update(
        pool_of(jnp.float32, jnp.float32, size), qkv, cos, sin, slots, page_offset=jnp.int32(0), backend=backend
    )
    keys, values = (values_of(pool, None, jnp.float32)[0, slots] for pool in (new.k, new.v))
    turned = as_complex(np.asarray(qkv), half) * (np.asarray(cos) + 1j * np.asarray(sin))[:, None, None]
    np.testing.assert_allclose(as_complex(keys, half), turned[:, :, GROUP], atol=1e-6)
    queries = q.reshape(5, HEADS, GROUP, size)
    np.testing.assert_allclose(as_complex(np.asarray(queries), half), turned[:, :, :GROUP], atol=1e-6)
    np.testing.assert_array_equal(queries[..., 2 * half :], qkv[:, :, :GROUP, 2 * half :])
    np.testing.assert_array_equal(keys[..., 2 * half :], qkv[:, :, GROUP, 2 * half :])
    np.testing.assert_array_equal(values, qkv[:, :, GROUP + 1])


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float8_pool_holds_values_to_one_part_in_sixteen_of_the_largest_beside_them(backend, dtype):
    qkv = new_values(5, dtype, seed=4)
    qkv = qkv.at[2, :, -1].set(0).at[3, :, -1].multiply(1000)
    k, v = qkv[:, :, -2], qkv[:, :, -1]
    slots = jnp.asarray([4, 23, 9, -1, 17], jnp.int32)
    old = pool_of(dtype, FLOAT8)
    _, new = update(old, qkv, *angles(5, 0), slots, page_offset=jnp.int32(PAGES), backend=backend)
    for before, after, scale_before, scale_after, values in (
        (old.k, new.k, old.k_scale, new.k_scale, k),
        (old.v, new.v, old.v_scale, new.v_scale, v),
    ):
        expected, found = values_of(before, scale_before, dtype), values_of(after, scale_after, dtype)
        for t, slot in enumerate(slots.tolist()):
            if slot >= 0:
                exact = np.asarray(values[t], np.float32)
                peak = np.abs(exact).max(-1, keepdims=True)
                # Float8 has three bits of mantissa: half a step of the value's own power of two, or of the smallest.
                assert (np.abs(found[1, slot] - exact) <= np.maximum(np.abs(exact) / 16, peak / 448 / 512) + 1e-7).all()
                expected[1, slot] = found[1, slot]
        np.testing.assert_array_equal(found, expected)


def test_both_backends_quantise_and_rotate_alike():
    qkv = new_values(5, jnp.bfloat16, 16)
    cos, sin = angles(5, 8)
    slots = jnp.asarray([4, 23, 9, 10, 17], jnp.int32)
    reference, triton = (
        update(pool_of(jnp.bfloat16, FLOAT8, 16), qkv, cos, sin, slots, page_offset=jnp.int32(0), backend=backend)
        for backend in BACKENDS
    )
    for mine, theirs in zip(jax.tree.leaves(reference), jax.tree.leaves(triton), strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(theirs, np.float32), rtol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, FLOAT8])
def test_stored_values_come_back_bit_by_bit(dtype):
    values = jnp.asarray([0.0, -0.0, 1.0, -2.5, 1e-7, 6e4, np.inf, -np.inf, np.nan], dtype)
    for platform in ("cpu", "gpu"):
        stored = encode(values, storage_dtype(dtype, platform))
        assert stored.dtype == storage_dtype(dtype, platform)
        back = decode(stored, dtype)
        assert back.dtype == dtype and np.asarray(back).tobytes() == np.asarray(values).tobytes()


def test_narrow_floats_are_stored_as_bits_on_cpu_only():
    assert storage_dtype("bfloat16", "cpu") == storage_dtype("float16", "cpu") == jnp.uint16
    assert storage_dtype(FLOAT8, "cpu") == jnp.uint8 and storage_dtype(FLOAT8, "gpu") == FLOAT8
    assert storage_dtype("float32", "cpu") == storage_dtype("float32", "gpu") == jnp.float32
    assert storage_dtype("bfloat16", "gpu") == jnp.bfloat16 and storage_dtype("float16", "gpu") == jnp.float16


def test_largest_value_of_a_head_becomes_the_largest_float8_and_a_head_of_zeros_stays_zero():
    stored, scale = quantise(jnp.asarray([[1.0, -3.0], [0.0, 0.0]], jnp.float32))
    assert stored.astype(jnp.float32)[0, 1] == -448 and float(scale[0]) == pytest.approx(3 / 448)
    assert (stored[1].astype(jnp.float32) == 0).all() and scale[1] == 1


@pytest.mark.parametrize("kv_dtype", [jnp.float32, jnp.bfloat16, FLOAT8])
def test_donated_pool_is_written_in_place(kv_dtype):
    stored = storage_dtype(kv_dtype, PLATFORM)
    values_shape = (LAYERS * 4096, 16, HEADS, 8)
    pool = jax.ShapeDtypeStruct(values_shape, stored)
    scale = jax.ShapeDtypeStruct((*values_shape[:2], HEADS if kv_dtype == FLOAT8 else 0), jnp.float32)
    dtype = jnp.float32 if kv_dtype == jnp.float32 else jnp.bfloat16
    qkv = jax.ShapeDtypeStruct((4, HEADS, 4, 8), dtype)
    angle = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    slots = jax.ShapeDtypeStruct((4,), jnp.int32)
    donating = jax.jit(functools.partial(update_kv, page_offset=4096), donate_argnums=0)
    kv = KVPool(pool, pool, scale, scale)
    usage = donating.lower(kv, qkv, angle, angle, slots).compile().memory_analysis()
    pool_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kv) if leaf.size)
    assert usage.alias_size_in_bytes >= pool_bytes and usage.temp_size_in_bytes < pool_bytes / 100


@pytest.mark.parametrize("kv_dtype", [*DTYPES, FLOAT8])
@pytest.mark.parametrize(("tokens", "half"), [(4, 64), (4, 0), (1000, 40)])
def test_kernel_lowers_for_a_gpu_that_is_not_there(kv_dtype, tokens, half):
    dtype = jnp.bfloat16 if kv_dtype == FLOAT8 else kv_dtype
    pool = jax.ShapeDtypeStruct((64, 16, 8, 128), kv_dtype)
    scale = jax.ShapeDtypeStruct((64, 16, 8 if kv_dtype == FLOAT8 else 0), jnp.float32)
    qkv = jax.ShapeDtypeStruct((tokens, 8, 6, 128), dtype)
    angle = jax.ShapeDtypeStruct((tokens, half), jnp.float32)
    slots = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    function = jax.jit(functools.partial(update_kv, page_offset=0, backend=Backend("triton")))
    with compat.abstract_gpu():
        traced = function.trace(KVPool(pool, pool, scale, scale), qkv, angle, angle, slots)
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
