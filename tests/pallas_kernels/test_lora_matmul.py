"""Low-rank adapters, one for each token: every backend against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.compat import abstract_gpu
from pallas_kernels.grouped_matmul.triton import Config
from pallas_kernels.lora_matmul import triton
from pallas_kernels.lora_matmul.api import expand, plan_adapters, shrink, unsupported

TRITON = Backend("triton", interpret=jax.default_backend() == "cpu")
BACKENDS = pytest.mark.parametrize("backend", [REFERENCE, TRITON], ids=lambda backend: backend.name)
ADAPTERS = 4
# (T, K, R, N, dtype): interpreting is slow to compile, so these are all there are
SIZES = (
    (1, 64, 8, 48, "float32"),
    (20, 96, 16, 130, "bfloat16"),
    (33, 576, 48, 40, "float16"),
    (9, 1024, 8, 64, "float32"),
)
TOLERANCE = {"float32": 4e-6, "bfloat16": 1.5e-2, "float16": 2e-3}


@functools.cache
def adapted(backend):
    def run(x, a, b, y, adapter_of_token):
        plan = plan_adapters(adapter_of_token, a.shape[0])
        shrunk = shrink(x, a, plan, backend=backend)
        return shrunk, expand(shrunk, b, y, plan, backend=backend)

    return jax.jit(run)


def operands(sizes, seed):
    num_tokens, num_inputs, rank, num_outputs, dtype = sizes
    shapes = (
        (num_tokens, num_inputs),
        (ADAPTERS, num_inputs, rank),
        (ADAPTERS, rank, num_outputs),
        (num_tokens, num_outputs),
    )
    draw = np.random.default_rng(seed)
    return [jnp.asarray(draw.standard_normal(shape), dtype) for shape in shapes]


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(data=st.data(), sizes=st.sampled_from(SIZES), seed=st.integers(0, 2**16), together=st.booleans())
def test_every_token_gets_its_adapter_and_only_that(backend, data, sizes, seed, together):
    present = data.draw(st.lists(st.integers(-1, ADAPTERS - 1), min_size=1, max_size=ADAPTERS))
    adapters = np.random.default_rng(seed).choice(present, sizes[0]).astype(np.int32)
    if together:  # as in prefill, where a request's tokens lie side by side
        adapters = np.sort(adapters)
    x, a, b, y = operands(sizes, seed)
    shrunk, out = adapted(backend)(x, a, b, y, jnp.asarray(adapters))
    assert shrunk.dtype == jnp.float32 and out.dtype == y.dtype
    wide_x, wide_a, wide_b, wide_y = (np.asarray(part, np.float64) for part in (x, a, b, y))
    has = adapters >= 0
    low = np.where(has[:, None], np.einsum("tk,tkr->tr", wide_x, wide_a[adapters]), 0)
    assert not np.asarray(shrunk)[~has].any()
    np.testing.assert_allclose(shrunk, low, rtol=0, atol=1e-5 * np.sqrt(sizes[1]) * 8)
    truth = wide_y + np.einsum("tr,trn->tn", low, wide_b[adapters]) * has[:, None]
    size = np.linalg.norm(low, axis=1, keepdims=True) * 4 + np.abs(truth)
    assert (np.abs(np.asarray(out, np.float64) - truth) <= TOLERANCE[sizes[4]] * size + 1e-6).all()
    np.testing.assert_array_equal(np.asarray(out)[~has], np.asarray(y)[~has])


def test_shares_of_a_split_contraction_sum_to_the_whole():
    x, a, _, _ = operands((5, 1000, 24, 8, "float32"), 0)
    plan = plan_adapters(jnp.asarray([3, -1, 0, 3, 1], jnp.int32), ADAPTERS)
    expected = shrink(x, a, plan)
    for splits in (1, 3):
        config = Config(block_n=32, block_k=128, num_splits=splits, num_warps=4, num_stages=2)
        run = jax.jit(functools.partial(triton.shrink, backend=TRITON, config=config))
        np.testing.assert_allclose(run(x, a, plan), expected, rtol=1e-5, atol=1e-4)


@BACKENDS
def test_no_tokens_give_no_tokens(backend):
    x, a, b, y = operands((0, 64, 8, 48, "float32"), 0)
    shrunk, out = adapted(backend)(x, a, b, y, jnp.zeros((0,), jnp.int32))
    assert shrunk.shape == (0, 8) and out.shape == (0, 48)


def test_what_triton_cannot_apply_is_said():
    backend = Backend("triton")
    assert unsupported(backend, 8, jnp.bfloat16, jnp.bfloat16) == ""
    assert "rank 256" in unsupported(backend, 256, jnp.bfloat16, jnp.bfloat16)
    assert "float32" in unsupported(backend, 8, jnp.float32, jnp.bfloat16)
    x, a, _, _ = operands((2, 64, 256, 8, "float32"), 0)
    with pytest.raises(ValueError, match="rank 256"):
        shrink(x, a, plan_adapters(jnp.zeros((2,), jnp.int32), ADAPTERS), backend=backend)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("num_tokens", [1, 700])
def test_kernels_lower_for_a_gpu(num_tokens, dtype):
    shapes = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in operands((num_tokens, 200, 24, 72, dtype), 0)]
    adapters = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
    with abstract_gpu():
        text = adapted(Backend("triton")).trace(*shapes, adapters).lower(lowering_platforms=("cuda",)).as_text()
    assert "lora_shrink" in text and "lora_expand" in text


def test_candidates_start_with_the_heuristic():
    a = jax.ShapeDtypeStruct((8, 4096, 16), jnp.bfloat16)
    b = jax.ShapeDtypeStruct((8, 16, 4096), jnp.bfloat16)
    shrinking, expanding = triton.shrink_candidates(12, a, 16, 132), triton.expand_candidates(b, 16)
    assert shrinking[0] == triton.shrink_heuristic(12, a, 16, 132) and len(set(shrinking)) == len(shrinking) > 4
    assert expanding[0] == triton.expand_heuristic(b, 16) and len(set(expanding)) == len(expanding) > 2
