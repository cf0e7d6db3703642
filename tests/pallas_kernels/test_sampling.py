"""Sampling primitives against NumPy, against transformers' logits warpers, and against the law of large numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pallas_kernels.sampling import reference as ops

ROWS = 4
VOCABS = [1, 63, 64, 65, 200]
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

argmax, rank, draw = jax.jit(ops.argmax), jax.jit(ops.rank), jax.jit(ops.draw)
top_k = jax.jit(ops.top_k, static_argnums=1)
keep_top_k, keep_top_p, keep_min_p = jax.jit(ops.keep_top_k), jax.jit(ops.keep_top_p), jax.jit(ops.keep_min_p)


@pytest.fixture(scope="module")
def warpers():
    pytest.importorskip("torch")
    from transformers import generation

    return generation


def distinct(seed, vocab, rows=ROWS):
    """f32[rows, vocab] logits of which no two in a row are equal or nearly so."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.linspace(-8, 8, vocab, dtype=np.float32), (rows, 1)), axis=1)


def tied(seed, vocab, rows=ROWS):
    """f32[rows, vocab] logits of five values, -inf among them."""
    values = np.array([-np.inf, -2.5, 0.0, 1.0, 3.0], np.float32)
    return np.random.default_rng(seed).choice(values, (rows, vocab))


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def warped(warper, row):
    import torch

    return warper(None, torch.tensor(row)[None])[0].numpy()


# Arg-max, top-k, rank


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("make", [distinct, tied])
def test_argmax_equals_numpy_first_index_on_ties(make, vocab):
    logits = make(vocab, vocab)
    np.testing.assert_array_equal(argmax(logits), logits.argmax(-1))


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("make", [distinct, tied])
def test_top_k_equals_a_stable_sort_lowest_index_first_on_ties(make, vocab):
    logits = make(vocab, vocab)
    for k in {min(3, vocab), vocab}:  # more than there are blocks of 64, and all
        values, ids = top_k(logits, k)
        expected = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, 1))


def test_top_k_finds_all_its_values_in_one_block_or_each_in_its_own():
    together, apart = np.zeros((2, 1, 64 * 20), np.float32)
    together[0, 64 * 7 : 64 * 7 + 20] = apart[0, 3::64] = np.arange(1, 21)
    assert top_k(together, 20)[1].tolist() == [list(range(64 * 7 + 19, 64 * 7 - 1, -1))]
    assert top_k(apart, 20)[1].tolist() == [list(range(64 * 19 + 3, 0, -64))]


def test_row_of_minus_infinity_yields_its_first_tokens():
    logits = np.full((2, 70), -np.inf, np.float32)
    assert argmax(logits).tolist() == [0, 0]
    values, ids = top_k(logits, 3)
    assert ids.tolist() == [[0, 1, 2]] * 2 and np.isneginf(values).all()


@pytest.mark.parametrize("make", [distinct, tied])
def test_rank_is_one_more_than_the_count_of_larger_logits(make):
    logits = make(3, 130)
    for token in range(0, 130, 13):
        value = logits[:, token]
        np.testing.assert_array_equal(rank(logits, value), (logits > value[:, None]).sum(-1) + 1)


# Filters


@FEW
@given(seed=st.integers(0, 2**32 - 1), k=st.lists(st.integers(1, 260), min_size=ROWS, max_size=ROWS))
def test_top_k_filter_equals_transformers(warpers, seed, k):
    logits = distinct(seed, 200)
    expected = [warped(warpers.TopKLogitsWarper(k_), row) for k_, row in zip(k, logits, strict=True)]
    np.testing.assert_array_equal(keep_top_k(logits, np.array(k, np.int32)), expected)


@FEW
@given(seed=st.integers(0, 2**32 - 1), p=st.lists(st.floats(1e-3, 0.999), min_size=ROWS, max_size=ROWS))
def test_top_p_filter_equals_transformers(warpers, seed, p):
    logits = distinct(seed, 200) * np.float32(0.7)
    p = np.array(p, np.float32)
    tail = np.cumsum(-np.sort(-softmax(logits)), -1)
    assume((np.abs(tail - p[:, None]) > 1e-5).all())  # else rounding decides on which side of p a token lies
    expected = [warped(warpers.TopPLogitsWarper(float(p_)), row) for p_, row in zip(p, logits, strict=True)]
    np.testing.assert_array_equal(keep_top_p(logits, p), expected)


@FEW
@given(seed=st.integers(0, 2**32 - 1), p=st.lists(st.floats(1e-4, 0.999), min_size=ROWS, max_size=ROWS))
def test_min_p_filter_equals_transformers(warpers, seed, p):
    logits = distinct(seed, 200)
    p = np.array(p, np.float32)
    ratio = softmax(logits) / softmax(logits).max(-1, keepdims=True)
    assume((np.abs(ratio / p[:, None] - 1) > 1e-5).all())
    expected = [warped(warpers.MinPLogitsWarper(float(p_)), row) for p_, row in zip(p, logits, strict=True)]
    np.testing.assert_array_equal(keep_min_p(logits, p), expected)


@pytest.mark.parametrize("make", [distinct, tied])
@pytest.mark.parametrize("vocab", [1, 200])
def test_disabled_filter_keeps_every_logit(make, vocab):
    logits = make(1, vocab)
    logits[1, 0] = np.inf
    for k in (0, -1, vocab, vocab + 1, 2**31 - 1):
        np.testing.assert_array_equal(keep_top_k(logits, np.full(ROWS, k, np.int32)), logits)
    np.testing.assert_array_equal(keep_top_p(logits, np.ones(ROWS, np.float32)), logits)
    np.testing.assert_array_equal(keep_min_p(logits, np.zeros(ROWS, np.float32)), logits)


@pytest.mark.parametrize("vocab", [1, 200])
@pytest.mark.parametrize("make", [distinct, tied])
def test_strictest_filter_leaves_the_likeliest_tokens(make, vocab):
    """Also where p is below any float32 (0) or below any normal one (1e-42)."""
    logits = make(2, vocab)
    likeliest = np.where(logits == logits.max(-1, keepdims=True), logits, -np.inf)
    np.testing.assert_array_equal(keep_top_k(logits, np.ones(ROWS, np.int32)), likeliest)
    np.testing.assert_array_equal(keep_min_p(logits, np.ones(ROWS, np.float32)), likeliest)
    for p in (1e-9, 1e-42, 0.0):
        np.testing.assert_array_equal(keep_top_p(logits, np.full(ROWS, p, np.float32)), likeliest)


def test_ties_at_the_threshold_stay():
    logits = np.array([[2.0, 1.0, 2.0, 0.0, 1.0, 1.0]], np.float32)
    keeps = [[0, 2], [0, 2], [0, 1, 2, 4, 5], [0, 1, 2, 4, 5]]
    for k, kept in enumerate(keeps, start=1):
        assert np.flatnonzero(np.isfinite(keep_top_k(logits, np.array([k], np.int32))[0])).tolist() == kept
    half = np.array([softmax(logits)[0, :3].sum() * 0.99], np.float32)
    assert np.flatnonzero(np.isfinite(keep_top_p(logits, half)[0])).tolist() == [0, 1, 2, 4, 5]


@FEW
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 100.0, 1e30]),
    k=st.integers(-1, 300),
    p=st.floats(0, 1, width=32, exclude_min=True),
    min_p=st.floats(0, 1, width=32),
)
def test_some_token_survives_any_filters_one_after_another(seed, scale, k, p, min_p):
    logits = distinct(seed, 200) * np.float32(scale)
    logits[0, :150] = -np.inf
    kept = keep_top_k(logits, np.full(ROWS, k, np.int32))
    kept = keep_top_p(kept, np.full(ROWS, p, np.float32))
    kept = np.asarray(keep_min_p(kept, np.full(ROWS, min_p, np.float32)))
    assert np.isfinite(kept).any(-1).all()
    np.testing.assert_array_equal(kept.max(-1), logits.max(-1))


@FEW
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 200), p=st.floats(1 / 64, 1 - 1 / 64, width=32))
def test_what_a_row_keeps_does_not_depend_on_the_other_rows(seed, k, p):
    logits = distinct(seed, 200)
    for keep, setting in (
        (keep_top_k, np.array([k, 0, 3, 200], np.int32)),
        (keep_top_p, np.array([p, 1, 0.5, 1e-9], np.float32)),
        (keep_min_p, np.array([p, 0, 0.5, 1], np.float32)),
    ):
        alone = np.concatenate([keep(logits[r : r + 1], setting[r : r + 1]) for r in range(ROWS)])
        np.testing.assert_array_equal(keep(logits, setting), alone)


# Draws


def test_draws_follow_softmax():
    """Pearson's chi-square over 20,000 positions; 15 degrees of freedom exceed 37.7 once in a thousand seeds."""
    logits = np.random.default_rng(1).normal(0, 1.5, 16).astype(np.float32)
    count = 20_000
    for seed in (0, 12345, 2**32 - 1):
        tokens = draw(np.tile(logits, (count, 1)), np.full(count, seed, np.uint32), np.arange(count, dtype=np.int32))
        observed = np.bincount(tokens, minlength=16)
        expected = softmax(logits) * count
        assert ((observed - expected) ** 2 / expected).sum() < 37.7


def test_draws_of_one_position_over_many_seeds_follow_softmax():
    logits = np.random.default_rng(2).normal(0, 1.5, 16).astype(np.float32)
    count = 20_000
    tokens = draw(np.tile(logits, (count, 1)), np.arange(count, dtype=np.uint32), np.full(count, 7, np.int32))
    expected = softmax(logits) * count
    assert ((np.bincount(tokens, minlength=16) - expected) ** 2 / expected).sum() < 37.7


def test_excluded_token_is_never_drawn():
    logits = np.tile(distinct(5, 65, 1), (5000, 1))
    logits[:, ::2] = -np.inf
    tokens = np.asarray(draw(logits, np.full(5000, 3, np.uint32), np.arange(5000, dtype=np.int32)))
    assert (tokens % 2 == 1).all() and tokens.max() < 65


def test_draw_depends_on_logits_seed_and_position_only():
    """Not on the place in the batch, the size of the batch, or what the other rows hold."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1, (8, 200)).astype(np.float32)
    seeds, positions = rng.integers(0, 2**32, 8, dtype=np.uint32), rng.integers(0, 5000, 8, dtype=np.int32)
    together = np.asarray(draw(logits, seeds, positions))
    order = rng.permutation(8)
    np.testing.assert_array_equal(draw(logits[order], seeds[order], positions[order]), together[order])
    for r in range(8):
        alone = draw(logits[r : r + 1], seeds[r : r + 1], positions[r : r + 1])
        others = np.full((8, 200), np.nan, np.float32)
        others[3] = logits[r]
        beside = draw(others, np.full(8, seeds[r]), np.full(8, positions[r]))
        assert alone[0] == beside[3] == together[r]


def test_other_seed_or_other_position_is_other_noise():
    flat = np.zeros((64, 5000), np.float32)
    same = np.full(64, 9, np.int32)
    for seeds, positions in ((np.arange(64), same), (same, np.arange(64))):
        tokens = np.asarray(draw(flat, seeds.astype(np.uint32), positions.astype(np.int32)))
        assert len(set(tokens.tolist())) > 60
    for swapped in ((3, 5), (5, 3)):  # (seed, position) is not their sum
        seeds, positions = np.full(64, swapped[0], np.uint32), np.full(64, swapped[1], np.int32)
        assert len(set(np.asarray(draw(flat, seeds, positions)).tolist())) == 1
    assert draw(flat[:1], np.uint32([3]), np.int32([5])) != draw(flat[:1], np.uint32([5]), np.int32([3]))


def test_noise_is_the_same_whatever_generator_the_process_prefers():
    """jax_default_prng_impl is the caller's to set; rbg noise, say, would depend on the place in the batch."""
    logits = np.zeros((4, 500), np.float32)
    seeds, positions = np.arange(4, dtype=np.uint32), np.arange(4, dtype=np.int32)
    expected = np.asarray(draw(logits, seeds, positions))
    with jax.default_prng_impl("rbg"):
        fresh = jax.jit(lambda *rows: ops.draw(*rows))  # ops.draw itself is traced and cached already
        np.testing.assert_array_equal(fresh(logits, seeds, positions), expected)


def test_everything_is_int32_tokens_and_float32_logits():
    logits = jnp.asarray(distinct(0, 65))
    seeds, positions = np.arange(ROWS, dtype=np.uint32), np.arange(ROWS, dtype=np.int32)
    assert {x.dtype for x in (argmax(logits), top_k(logits, 2)[1], rank(logits, logits[:, 0]))} == {jnp.dtype("int32")}
    assert draw(logits, seeds, positions).dtype == jnp.int32
    assert keep_top_p(logits, np.full(ROWS, 0.5, np.float32)).dtype == jnp.float32
