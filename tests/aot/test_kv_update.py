"""The scatter of keys and values, compiled for a GPU that is not there."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.backend import Backend
from pallas_kernels.kv_update.api import update_kv
from pallas_kernels.storage import FLOAT8, KVPool
from tests.aot.hopper import compile_kernel

pytestmark = pytest.mark.aot

PAGES, PAGE, HEADS, SIZE = 32 * 4096, 16, 8, 128


@pytest.mark.parametrize("kv_dtype", [jnp.bfloat16, FLOAT8])
@pytest.mark.parametrize("tokens", [1, 256, 8192])
def test_pool_is_written_in_place_by_one_kernel_that_spills_nothing(kv_dtype, tokens):
    pool = jax.ShapeDtypeStruct((PAGES, PAGE, HEADS, SIZE), kv_dtype)
    scale = jax.ShapeDtypeStruct((PAGES, PAGE, HEADS if kv_dtype == FLOAT8 else 0), jnp.float32)
    qkv = jax.ShapeDtypeStruct((tokens, HEADS, 6, SIZE), jnp.bfloat16)
    angle = jax.ShapeDtypeStruct((tokens, SIZE // 2), jnp.float32)
    slots = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    kv = KVPool(pool, pool, scale, scale)
    write = functools.partial(update_kv, page_offset=4096, backend=Backend("triton"))
    report = compile_kernel(write, kv, qkv, angle, angle, slots, donate=(0,))
    assert report.alias_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kv) if leaf.size)
    assert report.temp_bytes < 1 << 20
    assert [name for name in report.kernels if not name.startswith("wrapped")] == ["kv_update"]
    assert report.kernels["kv_update"].spill_bytes == 0
