"""Paged attention as machine code for a Hopper GPU: what the Triton kernels need to reach its roofs."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.backend import Backend
from pallas_kernels.paged_attention.api import attend, prepare_attention
from pallas_kernels.paged_attention.shape import AttentionShape
from pallas_kernels.paged_attention.triton_decode import DECODE
from pallas_kernels.paged_attention.triton_mixed import MIXED
from pallas_kernels.storage import KVPool
from tests.aot.hopper import compile_kernel

pytestmark = pytest.mark.aot

H200 = Backend("triton", "NVIDIA H200", 132)
NUM_ROWS, NUM_LAYERS, PAGES_PER_ROW = 64, 4, 512
POOL_TOKENS = 5 << 20  # of all layers: more than 4 GiB even of float8, where addresses have 64 bits

LLAMA = AttentionShape(32, 8, 128, 16, "bfloat16", "bfloat16")
SHAPES = {
    "llama3_8b": LLAMA,
    "llama2_13b": replace(LLAMA, num_heads=40, num_kv_heads=40),
    "float8": replace(LLAMA, kv_dtype="float8_e4m3fn"),
    "float16": replace(LLAMA, dtype="float16", kv_dtype="float16"),
    "group7": replace(LLAMA, num_heads=28, num_kv_heads=4),
    "page64": replace(LLAMA, page_size=64),
    "head64": replace(LLAMA, head_dim=64),
    "head80": replace(LLAMA, head_dim=80),
    "head96": replace(LLAMA, head_dim=96),
    "head256": replace(LLAMA, head_dim=256),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@functools.cache
def compiled(shape, num_tokens, num_rows=NUM_ROWS, window=0, soft_cap=0.0):
    def run(q, kv, page_offset, *batch):
        plan = prepare_attention(*batch, shape=shape, backend=H200)
        return attend(q, kv, plan, page_offset=page_offset, scale=0.1, window=window, soft_cap=soft_cap, backend=H200)

    num_pages = POOL_TOKENS // shape.page_size
    pool = jax.ShapeDtypeStruct((num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim), shape.kv_dtype)
    scales = (num_pages, shape.page_size, shape.num_kv_heads if shape.kv_itemsize == 1 else 0)
    scale = jax.ShapeDtypeStruct(scales, jnp.float32)
    ints = ((), (num_rows, PAGES_PER_ROW), (num_rows + 1,), (num_rows,), (num_tokens,), (num_tokens,))
    q = jax.ShapeDtypeStruct((num_tokens, shape.num_heads, shape.head_dim), shape.dtype)
    batch = (jax.ShapeDtypeStruct(size, jnp.int32) for size in ints)
    return compile_kernel(run, q, KVPool(pool, pool, scale, scale), *batch)


def layer_bytes(shape):
    tokens = POOL_TOKENS // NUM_LAYERS
    return tokens * shape.num_kv_heads * shape.head_dim * shape.kv_itemsize


@each_shape
def test_decode_streams_the_pool_in_wide_asynchronous_copies(shape):
    report = compiled(shape, NUM_ROWS)
    kernel = report.kernels[DECODE]
    assert kernel.spill_bytes == 0
    assert kernel.registers <= 168  # three programs of 128 threads a core at the least
    assert kernel.count("LDGSTS", "128") >= 12
    assert kernel.count("HMMA") > 0
    assert report.temp_bytes < layer_bytes(shape) / 8


@each_shape
def test_mixed_step_multiplies_by_warpgroups_without_spilling(shape):
    report = compiled(shape, 2048)
    kernel = report.kernels[MIXED]
    assert kernel.spill_bytes == 0
    assert kernel.count("HGMMA") >= 8
    assert kernel.count("HMMA") == 0
    assert kernel.count("LDGSTS", "128") >= 8
    assert report.kernels[DECODE].spill_bytes == 0
    assert report.temp_bytes < layer_bytes(shape) / 8


@pytest.mark.parametrize("num_tokens", [NUM_ROWS, 2048], ids=["decode", "mixed"])
@pytest.mark.parametrize(("window", "soft_cap"), [(1024, 0.0), (0, 30.0), (1024, 30.0)])
def test_window_and_soft_cap_cost_no_spills(num_tokens, window, soft_cap):
    for kernel in compiled(LLAMA, num_tokens, window=window, soft_cap=soft_cap).kernels.values():
        assert kernel.spill_bytes == 0


@pytest.mark.parametrize("num_rows", [1, 8, 256])
def test_decode_is_two_kernels_at_most_beside_the_plan(num_rows):
    report = compiled(LLAMA, num_rows, num_rows=num_rows)
    ours = [name for name in report.kernels if name.startswith(DECODE)]
    assert len(ours) == (1 if num_rows == 256 else 2)
    assert all(report.kernels[name].spill_bytes == 0 for name in ours)
    assert len(report.kernels) <= len(ours) + 1


def test_attention_never_copies_the_pool():
    for num_tokens in (NUM_ROWS, 2048):
        text = compiled(LLAMA, num_tokens).text
        pool = f"bf16[{POOL_TOKENS // 16},16,8,128]"
        assert pool in text
        assert not [line for line in text.splitlines() if pool in line.split("=")[-1] and " copy(" in line]
