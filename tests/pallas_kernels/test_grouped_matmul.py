"""Plans of grouped rows, and products by group: every backend against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.compat import abstract_gpu
from pallas_kernels.grouped_matmul import triton
from pallas_kernels.grouped_matmul.api import block_size, grouped_matmul, plan_groups, plan_sorted, unsupported
from pallas_kernels.grouped_matmul.plan import num_blocks

TRITON = Backend("triton", interpret=jax.default_backend() == "cpu")
BACKENDS = pytest.mark.parametrize("backend", [REFERENCE, TRITON], ids=lambda backend: backend.name)
GROUPS = 5
# (tokens, rows per token, K, N, block size, dtype): interpreting is slow to compile, so these are all there are
SIZES = (
    (1, 1, 64, 48, 16, "float32"),
    (12, 2, 40, 130, 16, "bfloat16"),
    (23, 3, 128, 32, 32, "float16"),
    (37, 1, 96, 20, 16, "float32"),
)
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1.5e-3}


@functools.cache
def by_group(backend, rows_per_token, size):
    def run(x, weights, group_of_row):
        plan = plan_groups(group_of_row, GROUPS, size)
        return grouped_matmul(x, weights, plan, rows_per_token=rows_per_token, backend=backend)

    return jax.jit(run)


@functools.cache
def by_sizes(backend, num_rows):
    def run(x, weights, group_sizes):
        return grouped_matmul(x, weights, plan_sorted(group_sizes, num_rows, 16), backend=backend)

    return jax.jit(run)


def normal(shape, seed, dtype):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def expected(x, weights, group_of_row, rows_per_token):
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    out = np.zeros((len(group_of_row), weights.shape[2]))
    for row, group in enumerate(group_of_row):
        if 0 <= group < len(weights):
            out[row] = x[row // rows_per_token] @ weights[group]
    return out


def assert_close(found, x, weights, group_of_row, rows_per_token=1):
    truth = expected(x, weights, group_of_row, rows_per_token)
    size = np.sqrt(x.shape[1]) * 8
    assert found.shape == truth.shape and found.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), truth, rtol=0, atol=TOLERANCE[x.dtype.name] * size)
    assert not np.asarray(found, np.float64)[(group_of_row < 0) | (group_of_row >= GROUPS)].any()


@BACKENDS
@settings(max_examples=15, deadline=None)
@given(data=st.data(), sizes=st.sampled_from(SIZES), seed=st.integers(0, 2**16))
def test_every_row_is_its_token_times_the_weight_of_its_group(backend, data, sizes, seed):
    num_tokens, rows_per_token, num_inputs, num_outputs, size, dtype = sizes
    num_rows = num_tokens * rows_per_token
    # Drawn from few groups most are empty, and some hold every row.
    present = data.draw(st.lists(st.integers(-1, GROUPS), min_size=1, max_size=GROUPS))
    group_of_row = np.random.default_rng(seed).choice(present, num_rows).astype(np.int32)
    x, weights = (
        normal((num_tokens, num_inputs), seed, dtype),
        normal((GROUPS, num_inputs, num_outputs), seed + 1, dtype),
    )
    found = by_group(backend, rows_per_token, size)(x, weights, jnp.asarray(group_of_row))
    assert_close(found, x, weights, group_of_row, rows_per_token)


@BACKENDS
@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(0, 15), min_size=GROUPS, max_size=GROUPS), seed=st.integers(0, 2**16))
@example(sizes=[0] * GROUPS, seed=0)
@example(sizes=[0, 40, 0, 0, 0], seed=0)
@example(sizes=[16, 0, 16, 1, 7], seed=0)
def test_rows_that_lie_sorted_take_sizes_and_those_beyond_are_zeros(backend, sizes, seed):
    num_rows = 40
    sizes = np.minimum.accumulate(np.maximum(num_rows - np.cumsum([0, *sizes[:-1]]), 0)).clip(max=sizes)
    group_of_row = np.repeat(np.arange(GROUPS + 1), [*sizes, num_rows - sum(sizes)]).astype(np.int32)
    x, weights = normal((num_rows, 64), seed, "float32"), normal((GROUPS, 64, 48), seed + 1, "float32")
    found = by_sizes(backend, num_rows)(x, weights, jnp.asarray(sizes, jnp.int32))
    assert_close(found, x, weights, group_of_row)


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.integers(-2, GROUPS + 1), min_size=33, max_size=33),
    size=st.sampled_from([1, 4, 16]),
)
def test_a_plan_holds_every_row_once_in_blocks_of_one_group(groups, size):
    plan = jax.jit(plan_groups, static_argnums=(1, 2))(jnp.asarray(groups, jnp.int32), GROUPS, size)
    owners, blocks = np.asarray(plan.block_group), np.asarray(plan.block_rows)
    assert blocks.shape == (num_blocks(33, GROUPS + 1, size), size)
    assert sorted(blocks[blocks < 33]) == list(range(33))
    normalised = [group if 0 <= group < GROUPS else GROUPS for group in groups]
    np.testing.assert_array_equal(plan.group_of_row, normalised)
    for owner, rows in zip(owners, blocks, strict=True):
        assert all(normalised[row] == owner for row in rows[rows < 33])
        assert (owner == -1) == (rows == 33).all()
    for group in range(GROUPS + 1):
        mine = blocks[owners == group]
        assert len(mine) == -(-normalised.count(group) // size)  # no weight is read more often than needed


def test_rows_keep_their_order_within_a_group():
    plan = plan_groups(jnp.asarray([1, 0, 1, 1, 0], jnp.int32), 2, 4)
    np.testing.assert_array_equal(plan.block_rows[:2], [[1, 4, 5, 5], [0, 2, 3, 5]])


@BACKENDS
def test_no_rows_give_no_rows(backend):
    plan = plan_groups(jnp.zeros((0,), jnp.int32), GROUPS, 16)
    out = grouped_matmul(jnp.zeros((0, 8)), jnp.zeros((GROUPS, 8, 4)), plan, backend=backend)
    assert out.shape == (0, 4)


@BACKENDS
def test_groups_that_no_row_takes_are_never_read(backend):
    weights = normal((GROUPS, 64, 48), 0, "float32").at[3].set(jnp.nan)
    group_of_row = jnp.asarray([0, 1, -1, 4, 2, 0], jnp.int32)
    assert np.isfinite(by_group(backend, 1, 16)(normal((6, 64), 1, "float32"), weights, group_of_row)).all()


def test_block_size_fits_an_average_group():
    assert [block_size(rows, 8) for rows in (1, 128, 129, 500, 10**6)] == [16, 16, 32, 64, 128]


def test_mixed_dtypes_are_refused_by_the_kernel():
    weights = jnp.zeros((GROUPS, 64, 48), jnp.bfloat16)
    assert "bfloat16" in unsupported(Backend("triton"), weights, jnp.float32)
    with pytest.raises(ValueError, match="float32"):
        plan = plan_groups(jnp.zeros((2,), jnp.int32), GROUPS, 16)
        grouped_matmul(jnp.zeros((2, 64)), weights, plan, backend=Backend("triton"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("num_tokens", [3, 1000])
def test_kernel_lowers_for_a_gpu(num_tokens, dtype):
    x, weights = jax.ShapeDtypeStruct((num_tokens, 200), dtype), jax.ShapeDtypeStruct((GROUPS, 200, 72), dtype)
    groups = jax.ShapeDtypeStruct((2 * num_tokens,), jnp.int32)
    run = by_group(Backend("triton"), 2, block_size(2 * num_tokens, GROUPS))
    with abstract_gpu():
        assert "grouped_matmul" in run.trace(x, weights, groups).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("block_rows", [16, 128])
def test_candidates_start_with_the_heuristic(block_rows):
    weights = jax.ShapeDtypeStruct((8, 4096, 14336), jnp.bfloat16)
    configs = triton.candidates(weights, block_rows)
    assert configs[0] == triton.heuristic(weights, block_rows) and len(set(configs)) == len(configs) > 4
