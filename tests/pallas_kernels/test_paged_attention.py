"""Paged attention against dense attention written token by token in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.kv_update.reference import update_kv
from pallas_kernels.paged_attention.reference import attend, prepare_attention
from pallas_kernels.storage import storage_dtype

NUM_PAGES, NUM_LAYERS = 128, 2  # what the largest case needs: 6 rows of 17 pages


def dense_attention(q, keys, values, positions, scale, window, soft_cap):
    """q [t, H, D] at `positions` over keys/values [c, Hkv, D] of one row, in float64."""
    group = q.shape[1] // keys.shape[1]
    out = np.zeros(q.shape, np.float64)
    for t, position in enumerate(positions):
        low = max(0, position - window + 1) if window else 0
        for h in range(q.shape[1]):
            scores = keys[low : position + 1, h // group] @ q[t, h] * scale
            if soft_cap:
                scores = soft_cap * np.tanh(scores / soft_cap)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ values[low : position + 1, h // group]
    return out


def run_case(rows, *, page_size, num_kv_heads, group, head_dim, window, soft_cap, decode, dtype, padding, seed):
    """rows: (context before this step, new tokens). Returns (paged, dense) outputs of the real tokens."""
    rng = np.random.default_rng(seed)
    lens = [before + new for before, new in rows]
    pages_per_row = max(-(-n // page_size) for n in lens)
    free = list(rng.permutation(np.arange(1, NUM_PAGES)))
    page_table = np.zeros((len(rows) + padding, pages_per_row), np.int32)
    for r, n in enumerate(lens):
        for m in range(-(-n // page_size)):
            page_table[r, m] = free.pop()
    keys = [rng.standard_normal((n, num_kv_heads, head_dim)).astype(np.float32) for n in lens]
    values = [rng.standard_normal((n, num_kv_heads, head_dim)).astype(np.float32) for n in lens]
    layer = 1
    shape = (NUM_LAYERS * NUM_PAGES, page_size, num_kv_heads, head_dim)
    pool_dtype = storage_dtype(dtype, "cpu")
    garbage = np.full(shape, np.nan, np.float32)  # what another request may have left behind
    k_pool = update_all(jnp.zeros(shape, pool_dtype), garbage, dtype)
    v_pool = update_all(jnp.zeros(shape, pool_dtype), garbage, dtype)
    slots = [page_table[r, p // page_size] * page_size + p % page_size for r, n in enumerate(lens) for p in range(n)]
    k_pool, v_pool = update_kv(
        k_pool,
        v_pool,
        jnp.asarray(np.concatenate(keys), dtype),
        jnp.asarray(np.concatenate(values), dtype),
        jnp.asarray(slots, jnp.int32),
        page_offset=layer * NUM_PAGES,
    )
    counts = [new for _, new in rows]
    num_tokens = len(rows) + padding if decode else sum(counts) + padding
    starts = np.concatenate([[0], np.cumsum(counts), [sum(counts)] * padding]).astype(np.int32)
    positions = np.zeros(num_tokens, np.int32)
    token_row = np.full(num_tokens, len(rows) + padding - 1, np.int32)
    q = rng.standard_normal((num_tokens, num_kv_heads * group, head_dim)).astype(np.float32)
    for r, (before, new) in enumerate(rows):
        positions[starts[r] : starts[r + 1]] = before + np.arange(new)
        token_row[starts[r] : starts[r + 1]] = r
    plan = prepare_attention(
        jnp.asarray(page_table),
        jnp.asarray(starts),
        jnp.asarray(lens + [0] * padding, jnp.int32),
        jnp.asarray(positions),
        jnp.asarray(token_row),
        page_size=page_size,
    )
    scale = head_dim**-0.5
    out = attend(
        jnp.asarray(q, dtype),
        k_pool,
        v_pool,
        plan,
        page_offset=layer * NUM_PAGES,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    assert np.isfinite(np.asarray(out, np.float32)).all()
    dense = [
        dense_attention(
            q[starts[r] : starts[r + 1]], keys[r], values[r], before + np.arange(new), scale, window, soft_cap
        )
        for r, (before, new) in enumerate(rows)
    ]
    return np.asarray(out, np.float32)[: sum(counts)], np.concatenate(dense)


def update_all(pool, values, dtype):
    flat = jnp.arange(pool.shape[0] * pool.shape[1], dtype=jnp.int32)
    values = jnp.asarray(values, dtype).reshape(-1, *pool.shape[2:])
    return update_kv(pool, pool, values, values, flat, page_offset=0)[0]


CASES = st.fixed_dictionaries(
    dict(
        page_size=st.sampled_from([8, 16, 64]),
        num_kv_heads=st.sampled_from([1, 3]),
        group=st.sampled_from([1, 2, 16]),
        head_dim=st.sampled_from([8, 80]),
        window=st.sampled_from([0, 1, 7, 40]),
        soft_cap=st.sampled_from([0.0, 5.0]),
        padding=st.sampled_from([0, 3]),
        seed=st.integers(0, 99),
    )
)


@settings(max_examples=5, deadline=None)
@given(case=CASES, rows=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=5))
def test_mixed_step_equals_dense_attention(case, rows):
    paged, dense = run_case(rows, decode=False, dtype=jnp.float32, **case)
    np.testing.assert_allclose(paged, dense, atol=2e-5)


@settings(max_examples=5, deadline=None)
@given(case=CASES, contexts=st.lists(st.integers(0, 130), min_size=1, max_size=6))
def test_decode_step_equals_dense_attention(case, contexts):
    paged, dense = run_case([(n, 1) for n in contexts], decode=True, dtype=jnp.float32, **case)
    np.testing.assert_allclose(paged, dense, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("decode", [True, False])
def test_sixteen_bit_pool_stored_as_bits_stays_close_to_float32(dtype, decode):
    rows = [(40, 1), (3, 1), (0, 1)] if decode else [(40, 1), (0, 20)]
    paged, dense = run_case(
        rows, page_size=16, num_kv_heads=2, group=2, head_dim=32, window=0, soft_cap=0.0, decode=decode, dtype=dtype,
        padding=1, seed=0,
    )  # fmt: skip
    np.testing.assert_allclose(paged, dense, atol=0.04)
