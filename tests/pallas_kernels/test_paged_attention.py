"""Paged attention of every backend against dense attention written token by token in NumPy."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import compat
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.paged_attention.api import attend, prepare_attention, unsupported
from pallas_kernels.paged_attention.shape import AttentionShape
from pallas_kernels.paged_attention.triton_decode import DecodeConfig, decode_candidates, decode_heuristic
from pallas_kernels.paged_attention.triton_mixed import MixedConfig, mixed_candidates, mixed_heuristic
from pallas_kernels.storage import KVPool, encode, quantise, storage_dtype

PLATFORM = jax.default_backend()
TRITON = Backend("triton", interpret=PLATFORM == "cpu")
BACKENDS = [pytest.param(REFERENCE, id="reference"), pytest.param(TRITON, id="triton")]

NUM_LAYERS, LAYER = 2, 1
NUM_ROWS, NUM_TOKENS, MAX_CONTEXT = 5, 64, 192  # of every program, so that few are compiled
TOLERANCE = {"float32": 3e-5, "bfloat16": 0.03, "float16": 0.004}


@dataclass(frozen=True)
class Case:
    """Everything static."""

    group: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    window: int = 0
    soft_cap: float = 0.0
    dtype: str = "float32"
    kv_dtype: str = ""  # as dtype

    @property
    def shape(self) -> AttentionShape:
        num_heads = self.group * self.num_kv_heads
        kv_dtype = self.kv_dtype or self.dtype
        return AttentionShape(num_heads, self.num_kv_heads, self.head_dim, self.page_size, self.dtype, kv_dtype)

    @property
    def pages_per_row(self) -> int:
        return MAX_CONTEXT // self.page_size

    @property
    def num_pages(self) -> int:
        return NUM_ROWS * self.pages_per_row + 1


CASES = [
    Case(group=4, num_kv_heads=2, head_dim=64, page_size=16),
    Case(group=16, num_kv_heads=1, head_dim=80, page_size=8, window=7),
    Case(group=1, num_kv_heads=3, head_dim=128, page_size=64, window=40, soft_cap=5.0),
    Case(group=3, num_kv_heads=1, head_dim=8, page_size=16, window=1),
    Case(group=2, num_kv_heads=2, head_dim=64, page_size=16, dtype="bfloat16"),
    Case(group=4, num_kv_heads=1, head_dim=96, page_size=8, soft_cap=5.0, dtype="float16"),
    Case(group=2, num_kv_heads=2, head_dim=64, page_size=16, kv_dtype="float8_e4m3fn"),
    Case(group=4, num_kv_heads=2, head_dim=32, page_size=64, window=40, dtype="bfloat16", kv_dtype="float8_e4m3fn"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: str(CASES.index(case)))
each_backend = pytest.mark.parametrize("backend", BACKENDS)
contexts = st.one_of(st.integers(0, MAX_CONTEXT - 1), st.sampled_from([0, 1, 7, 15, 16, 63, 64, 127, 128]))
chunks = st.lists(st.tuples(contexts, st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=NUM_ROWS)


@dataclass(frozen=True)
class Step:
    """Rows of (context before the step, new tokens), packed like a step, with everything nobody may look at spoilt."""

    case: Case
    rows: tuple[tuple[int, int], ...]
    num_tokens: int
    seed: int = 0
    alone: int = -1  # a row index: all other rows are left empty, tokens stay where they are

    def inputs(self):
        """(q, pool, page_table, query_start, kv_lens, positions, token_row)."""
        case, rng = self.case, np.random.default_rng(self.seed)
        lens = [before + new for before, new in self.rows] + [0] * (NUM_ROWS - len(self.rows))
        counts = [new for _, new in self.rows] + [0] * (NUM_ROWS - len(self.rows))
        q, keys, values = self.dense_inputs()
        free = iter(rng.permutation(np.arange(1, case.num_pages)))
        page_table = rng.integers(0, case.num_pages, (NUM_ROWS, case.pages_per_row)).astype(np.int32)
        pools = [np.full((NUM_LAYERS * case.num_pages, case.page_size, *k[0].shape[1:]), np.nan, np.float32)
                 for k in (keys, values)]  # fmt: skip
        for row, length in enumerate(lens):
            for start in range(0, length, case.page_size):
                page = page_table[row, start // case.page_size] = next(free)
                for pool, stored in zip(pools, (keys, values), strict=True):
                    part = stored[row][start : start + case.page_size]
                    pool[LAYER * case.num_pages + page, : len(part)] = part
        start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        positions = np.zeros(self.num_tokens, np.int32)
        token_row = np.full(self.num_tokens, NUM_ROWS - 1, np.int32)
        for row, (before, new) in enumerate(self.rows):
            positions[start[row] : start[row + 1]] = before + np.arange(new)
            token_row[start[row] : start[row + 1]] = row
        kv_lens = np.array([n if self.alone in (-1, row) else 0 for row, n in enumerate(lens)], np.int32)
        pool = self.pool(*pools)
        return jnp.asarray(q, case.dtype), pool, page_table, start, kv_lens, positions, token_row

    def pool(self, keys, values):
        shape = self.case.shape
        dtype = storage_dtype(shape.kv_dtype, PLATFORM)
        if shape.kv_itemsize > 1:
            none = jnp.zeros((*keys.shape[:2], 0), jnp.float32)
            return KVPool(*(encode(jnp.asarray(x, shape.kv_dtype), dtype) for x in (keys, values)), none, none)
        stored, scales = zip(*(quantise(jnp.asarray(x)) for x in (keys, values)), strict=True)
        return KVPool(*(encode(x, dtype) for x in stored), *scales)

    def dense_inputs(self):
        """q [T, H, D]; of each row keys and values [c, Hkv, D]; float32 as the pool will hold them."""
        shape, rng = self.case.shape, np.random.default_rng(self.seed + 1)
        q = rng.standard_normal((self.num_tokens, shape.num_heads, shape.head_dim)).astype(np.float32)
        kv = rng.standard_normal((2, NUM_ROWS, MAX_CONTEXT, shape.num_kv_heads, shape.head_dim)).astype(np.float32)
        keys, values = _rounded(kv, shape.kv_dtype)
        lens = [before + new for before, new in self.rows]
        return _rounded(q, shape.dtype), *([x[r, :n] for r, n in enumerate(lens)] for x in (keys, values))

    def dense(self):
        """float64[t, H, D] of the real tokens."""
        q, keys, values = self.dense_inputs()
        starts = np.concatenate([[0], np.cumsum([new for _, new in self.rows])])
        return np.concatenate([
            _dense_attention(self.case, q[starts[r] : starts[r + 1]], keys[r], values[r], before + np.arange(new))
            for r, (before, new) in enumerate(self.rows)
        ])  # fmt: skip


def _rounded(x, dtype):
    if dtype != "float8_e4m3fn":
        return x.astype(jnp.dtype(dtype)).astype(np.float32)
    stored, scale = quantise(jnp.asarray(x))
    return np.asarray(stored).astype(np.float32) * np.asarray(scale)[..., None]


def _dense_attention(case, q, keys, values, positions):
    """q [t, H, D] at `positions` over keys/values [c, Hkv, D] of one row, in float64."""
    keys, values = (np.repeat(x.astype(np.float64), case.group, axis=1) for x in (keys, values))
    scores = np.einsum("thd,chd->htc", q, keys) * case.head_dim**-0.5
    if case.soft_cap:
        scores = case.soft_cap * np.tanh(scores / case.soft_cap)
    key = np.arange(len(keys))
    visible = key <= positions[:, None]
    if case.window:
        visible &= key > positions[:, None] - case.window
    weights = np.where(visible, np.exp(scores - np.where(visible, scores, -np.inf).max(-1, keepdims=True)), 0)
    return np.einsum("htc,chd->thd", weights / weights.sum(-1, keepdims=True), values)


@functools.cache
def program(case, backend, config=None):
    """Compiled once for all steps of these sizes. config: of the decode kernel, else as chosen."""

    def run(q, pool, *batch):
        plan = prepare_attention(*batch, shape=case.shape, backend=backend)
        if config:
            plan = replace(plan, config=config)
        return attend(
            q, pool, plan, page_offset=jnp.int32(LAYER * case.num_pages), scale=case.head_dim**-0.5,
            window=case.window, soft_cap=case.soft_cap, backend=backend,
        )  # fmt: skip

    return jax.jit(run)


def check(step, backend, config=None):
    out = np.asarray(program(step.case, backend, config)(*step.inputs()), np.float64)
    assert np.isfinite(out).all()
    dense = step.dense()
    np.testing.assert_allclose(out[: len(dense)], dense, atol=TOLERANCE[step.case.dtype])


def fitting(rows):
    """As many of the rows as a step of NUM_TOKENS tokens and a table of MAX_CONTEXT tokens take."""
    kept, total = [], 0
    for before, new in rows[:NUM_ROWS]:
        new = min(new, NUM_TOKENS - total)
        if new:
            kept.append((min(before, MAX_CONTEXT - new), new))
            total += new
    return tuple(kept)


@each_backend
@each_case
@settings(max_examples=5, deadline=None)
@given(before=st.lists(contexts, min_size=1, max_size=NUM_ROWS), seed=st.integers(0, 99))
def test_decode_step_equals_dense_attention(case, backend, before, seed):
    check(Step(case, tuple((n, 1) for n in before), NUM_ROWS, seed), backend)


@each_backend
@each_case
@settings(max_examples=5, deadline=None)
@given(rows=chunks, seed=st.integers(0, 99))
def test_mixed_step_equals_dense_attention(case, backend, rows, seed):
    check(Step(case, fitting(rows), NUM_TOKENS, seed), backend)


@each_backend
@settings(max_examples=8, deadline=None)
@given(before=st.lists(contexts, min_size=2, max_size=NUM_ROWS), data=st.data())
def test_row_decodes_to_the_same_bits_alone_as_beside_others(backend, before, data):
    row = data.draw(st.integers(0, len(before) - 1))
    step = Step(CASES[0], tuple((n, 1) for n in before), NUM_ROWS)
    together = program(step.case, backend)(*step.inputs())[row]
    alone = program(step.case, backend)(*replace(step, alone=row).inputs())[row]
    np.testing.assert_array_equal(together, alone)


@settings(max_examples=8, deadline=None)
@given(rows=chunks, first=st.tuples(contexts, st.integers(1, 24)))
def test_chunk_gives_the_same_bits_alone_as_before_others(rows, first):
    step = Step(CASES[0], fitting([first, *rows]), NUM_TOKENS)
    q, pool, page_table, start, kv_lens, positions, token_row = step.inputs()
    count = start[1]
    alone = np.minimum(start, count), np.where(np.arange(NUM_ROWS) == 0, kv_lens, 0), positions, token_row
    run = program(step.case, TRITON)
    together = run(q, pool, page_table, start, kv_lens, positions, token_row)
    np.testing.assert_array_equal(together[:count], run(q, pool, page_table, *alone)[:count])


@pytest.mark.parametrize(
    "config", [DecodeConfig(1, 16), DecodeConfig(2, 64), DecodeConfig(16, 16), DecodeConfig(64, 16)], ids=str
)
def test_any_split_gives_dense_attention(config):
    check(Step(CASES[0], ((191, 1), (0, 1), (63, 1), (100, 1)), NUM_ROWS), TRITON, config)


@each_backend
def test_query_that_sees_nothing_of_the_first_block_is_not_spoilt_by_it(backend):
    check(Step(CASES[1], ((3, 20),), NUM_TOKENS), backend)


@each_backend
def test_row_without_context_gives_finite_output(backend):
    for num_tokens in (NUM_ROWS, NUM_TOKENS):
        check(Step(CASES[0], ((3, 1),), num_tokens), backend)


@pytest.mark.parametrize("num_tokens", [64, 2048], ids=["decode", "mixed"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_lowers_for_cuda(num_tokens, kv_dtype, head_dim):
    dtype = "bfloat16" if kv_dtype == "float8_e4m3fn" else kv_dtype
    shape, backend = AttentionShape(32, 8, head_dim, 16, dtype, kv_dtype), Backend("triton", "NVIDIA H200")

    def run(q, pool, *batch):
        plan = prepare_attention(*batch, shape=shape, backend=backend)
        return attend(q, pool, plan, page_offset=512, scale=0.1, window=256, soft_cap=30.0, backend=backend)

    with compat.abstract_gpu():
        jax.jit(run).trace(*abstract_inputs(shape, num_tokens)).lower(lowering_platforms=("cuda",))


def abstract_inputs(shape, num_tokens, num_rows=64, num_pages=1024, pages_per_row=128):
    """Arguments of a step as shapes."""
    kv = jax.ShapeDtypeStruct((num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim), shape.kv_dtype)
    scales = (num_pages, shape.page_size, shape.num_kv_heads if shape.kv_itemsize == 1 else 0)
    scale = jax.ShapeDtypeStruct(scales, jnp.float32)
    ints = ((num_rows, pages_per_row), (num_rows + 1,), (num_rows,), (num_tokens,), (num_tokens,))
    q = jax.ShapeDtypeStruct((num_tokens, shape.num_heads, shape.head_dim), shape.dtype)
    return q, KVPool(kv, kv, scale, scale), *(jax.ShapeDtypeStruct(size, jnp.int32) for size in ints)


def test_heuristics_come_first_among_distinct_candidates():
    shape = AttentionShape(32, 8, 128, 16, "bfloat16", "bfloat16")
    decode = decode_candidates(shape, 64, 8192, 132)
    mixed = mixed_candidates(shape, 2048)
    assert decode[0] == decode_heuristic(shape, 64, 8192, 132)
    assert mixed[0] == mixed_heuristic(shape, 2048) == MixedConfig(128, 128, 8, 2)
    assert len(set(decode)) == len(decode) and len(set(mixed)) == len(mixed)


@pytest.mark.parametrize("num_rows", [1, 8, 64, 256])
def test_decode_fills_the_device_unless_contexts_are_short(num_rows):
    shape = AttentionShape(32, 8, 128, 16, "bfloat16", "bfloat16")
    config = decode_heuristic(shape, num_rows, 8192, 132)
    assert num_rows * 8 * config.num_splits >= 4 * 132
    assert decode_heuristic(shape, num_rows, 64, 132).num_splits == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(head_dim=512), "head_dim 512"),
        (dict(head_dim=36), "multiple of 8"),
        (dict(page_size=24), "power of two"),
        (dict(num_kv_heads=5), "do not divide"),
        (dict(num_heads=1024), "query heads"),
    ],
)
def test_unsupported_shape_is_told_with_its_reason(change, reason):
    shape = AttentionShape(32, 8, 128, 16, "bfloat16", "bfloat16")
    assert unsupported(TRITON, shape) == unsupported(REFERENCE, replace(shape, **change)) == ""
    assert reason in unsupported(TRITON, replace(shape, **change))
    assert "cudnn" in unsupported(Backend("cudnn"), shape)
