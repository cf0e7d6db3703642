"""Writing keys and values into the pool: what is written where, and what is left alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kv_update.reference import update_kv
from pallas_kernels.storage import decode, encode, storage_dtype

LAYERS, PAGES, PAGE, HEADS, SIZE = 3, 6, 4, 2, 8
TOKENS = PAGES * PAGE - PAGE  # as many as fit beside the waste page
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
update = jax.jit(update_kv)


def pools(dtype, seed=0):
    shape = (LAYERS * PAGES, PAGE, HEADS, SIZE)
    values = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
    return [encode(jnp.asarray(v, dtype), storage_dtype(dtype, "cpu")) for v in values]


def new_values(tokens, dtype, seed=1):
    values = np.random.default_rng(seed).standard_normal((2, tokens, HEADS, SIZE)).astype(np.float32)
    return [jnp.asarray(v, dtype) for v in values]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=10, deadline=None)
@given(
    slots=st.lists(st.integers(PAGE, PAGES * PAGE - 1), unique=True, max_size=TOKENS),
    layer=st.integers(0, LAYERS - 1),
)
def test_pool_equals_the_old_one_but_for_the_written_slots(dtype, slots, layer):
    values = new_values(TOKENS, dtype)
    old = pools(dtype)
    kv_slots = jnp.asarray(slots + [0] * (TOKENS - len(slots)), jnp.int32)
    new = update(*old, *values, kv_slots, page_offset=layer * PAGES)
    for before, after, written in zip(old, new, values, strict=True):
        expected = np.array(decode(before, dtype)).reshape(LAYERS, PAGES * PAGE, HEADS, SIZE)
        found = np.asarray(decode(after, dtype)).reshape(expected.shape)
        expected[layer, slots] = np.asarray(written)[: len(slots)]
        expected[layer, 0] = found[layer, 0]  # padding may leave anything there
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_values_come_back_bit_by_bit(dtype):
    values = jnp.asarray([0.0, -0.0, 1.0, -2.5, 1e-7, 6e4, np.inf, -np.inf, np.nan], dtype)
    for platform in ("cpu", "gpu"):
        stored = encode(values, storage_dtype(dtype, platform))
        assert stored.dtype == storage_dtype(dtype, platform)
        back = decode(stored, dtype)
        assert back.dtype == dtype and np.asarray(back).tobytes() == np.asarray(values).tobytes()


def test_sixteen_bit_floats_are_stored_as_bits_on_cpu_only():
    assert storage_dtype("bfloat16", "cpu") == storage_dtype("float16", "cpu") == jnp.uint16
    assert storage_dtype("float32", "cpu") == storage_dtype("float32", "gpu") == jnp.float32
    assert storage_dtype("bfloat16", "gpu") == jnp.bfloat16 and storage_dtype("float16", "gpu") == jnp.float16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_donated_pool_is_written_in_place(dtype):
    platform = jax.default_backend()
    pool = jax.ShapeDtypeStruct((LAYERS * 4096, 16, HEADS, SIZE), storage_dtype(dtype, platform))
    values = jax.ShapeDtypeStruct((4, HEADS, SIZE), dtype)
    slots = jax.ShapeDtypeStruct((4,), jnp.int32)
    donating = jax.jit(functools.partial(update_kv, page_offset=4096), donate_argnums=(0, 1))
    usage = donating.lower(pool, pool, values, values, slots).compile().memory_analysis()
    pool_bytes = 2 * pool.size * pool.dtype.itemsize
    assert usage.alias_size_in_bytes == pool_bytes and usage.temp_size_in_bytes < pool_bytes / 100
