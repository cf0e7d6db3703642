"""The Hopper attention kernel compiled for an H200: wgmma and TMA are there, nothing spills, the pool is not copied."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.backend import Backend
from pallas_kernels.paged_attention import mosaic
from pallas_kernels.paged_attention.shape import AttentionShape
from pallas_kernels.storage import KVPool
from tests.aot.hopper import DUMP, compile_kernel

pytestmark = pytest.mark.aot

BACKEND = Backend("mosaic", device="NVIDIA H200")
NUM_PAGES, NUM_ROWS, NUM_TOKENS, PAGES_PER_ROW = 1000, 8, 512, 257

LLAMA_3_8B = AttentionShape(32, 8, 128, 16, "bfloat16", "bfloat16")
SHAPES = {
    "llama-3-8b": LLAMA_3_8B,
    "llama-2-13b": AttentionShape(40, 40, 128, 16, "bfloat16", "bfloat16"),
    "seven heads a group": AttentionShape(28, 4, 128, 16, "bfloat16", "bfloat16"),
    "sixteen heads a group": AttentionShape(16, 1, 128, 32, "float16", "float16"),
    "pages of 8": AttentionShape(8, 8, 64, 8, "bfloat16", "bfloat16"),
    "pages of 128": AttentionShape(32, 8, 64, 128, "bfloat16", "bfloat16"),
    "head size 256": AttentionShape(8, 4, 256, 16, "bfloat16", "bfloat16"),
}


@pytest.fixture(autouse=True)
def dumped(monkeypatch):
    """Mosaic writes its PTX where the harness looks for XLA's."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(DUMP))


def compiled(shape, *, window=0, soft_cap=0.0):
    """(report, the one kernel) of a mixed step."""

    def step(q, kv, page_table, query_start, kv_lens, positions, token_row):
        plan = mosaic.prepare_attention(
            page_table, query_start, kv_lens, positions, token_row, shape=shape, backend=BACKEND
        )
        scale = shape.head_dim**-0.5
        return mosaic.attend(
            q, kv, plan, page_offset=100, scale=scale, window=window, soft_cap=soft_cap, backend=BACKEND
        )

    def ints(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.int32)

    pool = jax.ShapeDtypeStruct((NUM_PAGES, shape.page_size, shape.num_kv_heads, shape.head_dim), shape.dtype)
    scales = jax.ShapeDtypeStruct((NUM_PAGES, shape.page_size, 0), jnp.float32)
    q = jax.ShapeDtypeStruct((NUM_TOKENS, shape.num_heads, shape.head_dim), shape.dtype)
    report = compile_kernel(
        step,
        q,
        KVPool(pool, pool, scales, scales),
        ints(NUM_ROWS, PAGES_PER_ROW),
        ints(NUM_ROWS + 1),
        ints(NUM_ROWS),
        ints(NUM_TOKENS),
        ints(NUM_TOKENS),
    )
    [kernel] = [kernel for name, kernel in report.kernels.items() if "paged_attention_mixed" in name]
    return report, kernel


def check(kernel):
    assert kernel.spill_bytes == 0, kernel
    assert kernel.count("HGMMA") >= 8
    assert kernel.count("UTMALDG") >= 2
    assert kernel.count("UTMASTG") >= 1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mixed_kernel_multiplies_by_wgmma_copies_by_tma_and_does_not_spill(shape):
    assert mosaic.unsupported(shape) == ""
    report, kernel = compiled(shape)
    check(kernel)
    assert report.temp_bytes < 1 << 20


@pytest.mark.parametrize("shape", [LLAMA_3_8B, SHAPES["head size 256"]], ids=["128", "256"])
def test_window_and_soft_cap_do_not_spill(shape):
    check(compiled(shape, window=4096, soft_cap=50.0)[1])


@pytest.mark.parametrize("config", mosaic.candidates(LLAMA_3_8B)[1:], ids=str)
def test_every_configuration_a_tuner_may_try_compiles_without_spills(config, monkeypatch):
    monkeypatch.setattr(mosaic, "candidates", lambda shape: [config])
    check(compiled(LLAMA_3_8B)[1])
