"""The Hopper attention backend against the reference: its plan, and its kernel interpreted, plain products for wgmma.

The interpreter runs every thread of a block and knows barriers, TMA and proxy fences; wgmma itself it does not know.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compat
from pallas_kernels.backend import Backend
from pallas_kernels.paged_attention import mosaic, reference
from pallas_kernels.paged_attention.shape import AttentionShape
from pallas_kernels.storage import KVPool, encode, storage_dtype

pytest.importorskip("absl", reason="Mosaic GPU imports absl")

PLATFORM = jax.default_backend()
BACKEND = Backend("mosaic", interpret=PLATFORM == "cpu")
NUM_ROWS, NUM_TOKENS, MAX_CONTEXT, NUM_LAYERS = 3, 48, 256, 2
TOLERANCE = {"bfloat16": 0.03, "float16": 0.004}

interpreted_fast = pytest.mark.skipif(
    PLATFORM == "cpu" and jax.__version_info__ < (0, 11),
    reason="the interpreter of JAX 0.10 compiles every block of the grid anew: minutes instead of seconds",
)


def shape_of(group=2, num_kv_heads=1, head_dim=64, page_size=16, dtype="bfloat16"):
    return AttentionShape(group * num_kv_heads, num_kv_heads, head_dim, page_size, dtype, dtype)


def packed(rows, num_tokens=NUM_TOKENS):
    """(query_start, kv_lens, positions, token_row) of rows (context before the step, new tokens)."""
    counts = np.array([new for _, new in rows] + [0] * (NUM_ROWS - len(rows)))
    query_start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    kv_lens = np.array([sum(row) for row in rows] + [0] * (NUM_ROWS - len(rows)), np.int32)
    positions = np.zeros(num_tokens, np.int32)
    token_row = np.full(num_tokens, NUM_ROWS - 1, np.int32)
    for r, (before, new) in enumerate(rows):
        positions[query_start[r] : query_start[r + 1]] = before + np.arange(new)
        token_row[query_start[r] : query_start[r + 1]] = r
    return query_start, kv_lens, positions, token_row


def inputs(shape, rows, num_tokens=NUM_TOKENS, seed=0):
    """(q, pool, prepare_attention's arguments); what nobody may look at is NaN, spare page ids point anywhere."""
    rng = np.random.default_rng(seed)
    query_start, kv_lens, positions, token_row = packed(rows, num_tokens)
    pages_per_row = MAX_CONTEXT // shape.page_size
    num_pages = NUM_ROWS * pages_per_row + 1
    page_table = 1 + rng.permutation(NUM_ROWS * pages_per_row).reshape(NUM_ROWS, pages_per_row)
    stored = np.full((2, NUM_LAYERS * num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim), np.nan)
    for r, length in enumerate(kv_lens):
        at = np.arange(length)
        pages = num_pages + page_table[r, at // shape.page_size]
        stored[:, pages, at % shape.page_size] = rng.standard_normal((2, length, *stored.shape[3:]))
    dtype = storage_dtype(shape.dtype, PLATFORM)
    none = jnp.zeros((*stored.shape[1:3], 0), jnp.float32)
    pool = KVPool(*(encode(jnp.asarray(x, shape.dtype), dtype) for x in stored), none, none)
    q = jnp.asarray(rng.standard_normal((num_tokens, shape.num_heads, shape.head_dim)), shape.dtype)
    arguments = (page_table.astype(np.int32), query_start, kv_lens, positions, token_row)
    return q, pool, tuple(jnp.asarray(x) for x in arguments), num_pages


def assert_equals_reference(shape, rows, *, window=0, soft_cap=0.0, num_tokens=NUM_TOKENS, seed=0):
    q, pool, arguments, num_pages = inputs(shape, rows, num_tokens, seed)
    how = dict(page_offset=num_pages, scale=shape.head_dim**-0.5, window=window, soft_cap=soft_cap)
    plan = mosaic.prepare_attention(*arguments, shape=shape, backend=BACKEND)
    out = np.asarray(mosaic.attend(q, pool, plan, backend=BACKEND, **how), np.float32)
    truth = reference.attend(q, pool, reference.prepare_attention(*arguments, shape=shape), **how)
    assert np.isfinite(out).all()  # padding tokens too
    real = sum(new for _, new in rows)
    np.testing.assert_allclose(out[:real], np.asarray(truth, np.float32)[:real], atol=TOLERANCE[shape.dtype])


row = st.tuples(st.integers(0, MAX_CONTEXT - 16), st.one_of(st.just(1), st.integers(1, 16)))
rows_of_a_step = st.lists(row, min_size=1, max_size=NUM_ROWS)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 16)), min_size=1, max_size=NUM_ROWS),
    group=st.sampled_from([1, 2, 3, 7, 16]),
)
def test_plan_puts_every_token_into_one_tile_of_its_row(rows, group):
    shape = shape_of(group=group, head_dim=128)
    query_start, kv_lens, positions, token_row = packed(rows)
    page_table = jnp.zeros((NUM_ROWS, 5), jnp.int32)
    plan = mosaic.prepare_attention(
        page_table, *(jnp.asarray(x) for x in (query_start, kv_lens, positions, token_row)), shape=shape,
        backend=BACKEND,
    )  # fmt: skip
    assert plan.page_table.shape[1] * shape.page_size % plan.config.block_kv == 0
    tiles = jax.tree.map(np.asarray, plan.tiles)
    real, owner = query_start[-1], np.full(NUM_TOKENS, -1)
    for tile in range(len(tiles.row)):
        tokens = np.arange(tiles.token[tile], tiles.token[tile] + tiles.num_tokens[tile])
        assert (owner[tokens] == -1).all()
        owner[tokens] = tile
        if len(tokens) and tokens[0] < real:
            assert (token_row[tokens] == tiles.row[tile]).all() and tokens[-1] < real
            assert (positions[tokens] == tiles.position[tile] + np.arange(len(tokens))).all()
            assert tiles.context[tile] == kv_lens[tiles.row[tile]]
        else:
            assert tiles.context[tile] == 0
    assert (owner >= 0).all()


def test_one_tile_equals_the_reference():
    assert_equals_reference(shape_of(), [(70, 2)], num_tokens=2)


@interpreted_fast
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (shape_of(), {}),
        (shape_of(group=7, head_dim=128, dtype="float16"), dict(window=40)),
        (shape_of(group=1, num_kv_heads=2, page_size=64), dict(soft_cap=5.0)),
        (shape_of(group=4, head_dim=256, page_size=8), dict(window=1)),
        (shape_of(group=16, head_dim=128, page_size=128), {}),
    ],
    ids=["plain", "seven-window", "ungrouped-soft-cap", "wide-window-1", "sixteen"],
)
@settings(max_examples=2, deadline=None)
@given(rows=rows_of_a_step, seed=st.integers(0, 99))
def test_mixed_step_equals_the_reference(shape, options, rows, seed):
    assert_equals_reference(shape, rows, seed=seed, **options)


@interpreted_fast
@pytest.mark.skipif(PLATFORM != "cpu", reason="races are looked for by the interpreter")
@pytest.mark.parametrize("num_warpgroups", [1, 2])
def test_no_race_for_shared_memory(num_warpgroups, monkeypatch):
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

    config = mosaic.MixedConfig(num_warpgroups, block_kv=64, num_stages=2)
    options = compat.mosaic_interpreter(detect_races=True)
    monkeypatch.setattr(compat, "mosaic_interpreter", lambda: options)
    monkeypatch.setattr(mosaic, "candidates", lambda shape: [config])
    assert_equals_reference(shape_of(), [(200, 9), (3, 1)])
    assert not interpreter.get_races().races_found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("window", [0, 40])
def test_mixed_step_lowers_for_hopper(dtype, window):
    shape = shape_of(group=4, num_kv_heads=2, head_dim=128, dtype=dtype)
    q, pool, arguments, num_pages = inputs(shape, [(40, 1), (0, 20)])
    pool = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype if x.ndim == 4 else x.dtype), pool)
    compiled = Backend("mosaic")

    def step(q, kv, *arguments):
        plan = mosaic.prepare_attention(*arguments, shape=shape, backend=compiled)
        return mosaic.attend(
            q, kv, plan, page_offset=num_pages, scale=1.0, window=window, soft_cap=0.0, backend=compiled
        )

    with compat.abstract_gpu():
        lowered = jax.jit(step).trace(q, pool, *arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_decode_step_is_left_to_triton():
    shape = shape_of()
    rows = [(40, 1), (3, 1), (130, 1)]
    assert_equals_reference(shape, rows, num_tokens=NUM_ROWS)
    plan = mosaic.prepare_attention(*inputs(shape, rows, NUM_ROWS)[2], shape=shape, backend=BACKEND)
    assert not isinstance(plan, mosaic.MixedPlan)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (shape_of(), ""),
        (shape_of(dtype="float32"), "float32"),
        (AttentionShape(8, 2, 64, 16, "bfloat16", "float8_e4m3fn"), "float8_e4m3fn"),
        (shape_of(head_dim=80), "head_dim 80"),
        (shape_of(page_size=4), "page_size 4"),
        (shape_of(group=16, head_dim=256), "shared memory"),
    ],
)
def test_unsupported_names_the_reason(shape, reason):
    message = mosaic.unsupported(shape)
    assert reason in message
    assert bool(message) == bool(reason)
