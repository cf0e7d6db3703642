"""One body for all backends of `sample`: its laws, transformers' filters, and the tokens of the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.sampling import api, noise, reference, settle, triton
from pallas_kernels.sampling.adjust import PROMPT_FLAG

ROWS, VOCAB, SLOTS = 16, 300, 5
MANY = 512, 70  # rows and vocabulary where draws are counted
WORDS = -(-VOCAB // 32)
FEW = settings(max_examples=40, deadline=None)
TRITON = Backend("triton", interpret=jax.default_backend() == "cpu")
EXACT = TRITON.interpret  # compiled, logarithms and sums round otherwise and may rarely change who wins

# A block of 64 makes rows of several blocks of so small a vocabulary.
in_blocks = functools.partial(triton.sample, config=triton.Config(block=64, num_warps=2), interpret=TRITON.interpret)
IMPLEMENTATIONS = {
    "reference": functools.partial(api.sample, backend=REFERENCE),
    "triton": functools.partial(api.sample, backend=TRITON),
    "triton_in_blocks": in_blocks,
}
JITTED = {name: jax.jit(lambda logits, given, f=f: f(logits, **given)) for name, f in IMPLEMENTATIONS.items()}


@pytest.fixture(params=IMPLEMENTATIONS)
def sample(request):
    """i32[R] = sample(logits, **what is not at its neutral value)."""
    return functools.partial(run, JITTED[request.param])


def run(jitted, logits, **given):
    return np.array(jitted(logits, arguments(*logits.shape, **given)))


def arguments(rows, vocab, **given):
    """All arguments of `sample` but the logits, neutral ones unless given; scalars become columns."""
    neutral = dict(
        temperature=np.float32(0),
        top_k=np.int32(0),
        top_p=np.float32(1),
        min_p=np.float32(0),
        seeds=np.uint32(0),
        positions=np.arange(rows, dtype=np.int32),
        bitmask=np.uint32(0xFFFFFFFF),
        adjusts=np.int32(0),
        slots=np.int32(SLOTS),
        token_counts=np.zeros((SLOTS, vocab), np.int32),
        logit_bias=np.zeros((SLOTS, vocab), np.float32),
        repetition_penalty=np.float32(1),
        presence_penalty=np.float32(0),
        frequency_penalty=np.float32(0),
    )
    shapes = dict(bitmask=(rows, -(-vocab // 32)), token_counts=(SLOTS, vocab), logit_bias=(SLOTS, vocab))
    return {
        name: np.broadcast_to(np.asarray(given.get(name, value), value.dtype), shapes.get(name, (rows,)))
        for name, value in neutral.items()
    }


def bits_of(allowed):
    """bool[R, V] as bitmask."""
    padded = np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 32)))
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4")


def distinct(rng, rows=ROWS, vocab=VOCAB, spread=16.0):
    line = np.linspace(-spread / 2, spread / 2, vocab, dtype=np.float32)
    return rng.permuted(np.tile(line, (rows, 1)), axis=1)


def logits_of_kind(rng, kind):
    shape = ROWS, VOCAB
    if kind == "tied":
        return rng.choice(np.array([-np.inf, -2.5, 0.0, 1.0, 3.0], np.float32), shape)
    if kind == "wild":
        return (rng.choice([-1, 1], shape) * 10 ** rng.uniform(-30, 30, shape)).astype(np.float32)
    if kind == "mostly forbidden":
        return np.where(rng.random(shape) < 0.97, -np.inf, rng.normal(0, 3, shape)).astype(np.float32)
    return rng.normal(0, {"flat": 1e-3, "usual": 3, "peaked": 60}[kind], shape).astype(np.float32)


def mixed(rng):
    """Arguments of ROWS rows that differ in every way."""
    maybe = lambda chance, on, off: np.where(rng.random(ROWS) < chance, on, off)  # noqa: E731
    allowed = rng.random((ROWS, VOCAB)) < maybe(0.5, 1.0, 0.5)[:, None]
    bias = np.where(rng.random((SLOTS, VOCAB)) < 0.1, rng.normal(0, 3, (SLOTS, VOCAB)), 0)
    bias[rng.random((SLOTS, VOCAB)) < 0.1] = -np.inf
    generated = rng.integers(0, 4, (SLOTS, VOCAB)) * (rng.random((SLOTS, VOCAB)) < 0.3)
    return dict(
        temperature=maybe(0.8, rng.uniform(0.2, 2.0, ROWS), 0.0),
        top_k=maybe(0.5, rng.integers(1, VOCAB + 10, ROWS), rng.integers(-1, 1, ROWS)),
        top_p=maybe(0.5, rng.uniform(0.01, 1.0, ROWS), 1.0),
        min_p=maybe(0.3, rng.uniform(0.0, 0.3, ROWS), 0.0),
        seeds=rng.integers(0, 2**32, ROWS),
        positions=rng.integers(0, 9000, ROWS),
        bitmask=bits_of(allowed),
        adjusts=rng.integers(0, 2, ROWS),
        slots=rng.integers(0, SLOTS + 1, ROWS),
        token_counts=generated + PROMPT_FLAG * (rng.random((SLOTS, VOCAB)) < 0.2),
        logit_bias=bias,
        repetition_penalty=rng.uniform(0.7, 1.5, ROWS),
        presence_penalty=rng.uniform(-1, 1, ROWS),
        frequency_penalty=rng.uniform(-1, 1, ROWS),
    )


# Backends against each other


@pytest.mark.parametrize("name", ["triton", "triton_in_blocks"])
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["usual", "flat", "peaked", "tied", "mostly forbidden"]))
def test_kernel_draws_the_tokens_of_the_reference(name, seed, kind):
    rng = np.random.default_rng(seed)
    logits, given_ = logits_of_kind(rng, kind), mixed(rng)
    expected, found = run(JITTED["reference"], logits, **given_), run(JITTED[name], logits, **given_)
    assert (found != expected).sum() <= (0 if EXACT else 1)


@FEW
@given(seed=st.integers(0, 2**32 - 1), temperature=st.sampled_from([1e-5, 1.0, 2.0]))
def test_kernel_draws_the_tokens_of_the_reference_from_wild_values_too(seed, temperature):
    """Thresholds between values of any magnitude, where bisection is hardest. Penalties would leave float32."""
    rng = np.random.default_rng(seed)
    logits = np.clip(logits_of_kind(rng, "wild"), -1e30, 1e30)
    only = {name: value for name, value in mixed(rng).items() if name in ("top_k", "top_p", "min_p", "seeds")}
    expected, found = (run(JITTED[n], logits, temperature=temperature, **only) for n in ("reference", "triton"))
    assert (found != expected).sum() <= (0 if EXACT else 1)


# Greedy


@pytest.mark.parametrize("kind", ["usual", "tied"])
def test_row_without_temperature_gives_the_first_of_the_likeliest(sample, kind):
    logits = logits_of_kind(np.random.default_rng(0), kind)
    np.testing.assert_array_equal(sample(logits, top_k=5, top_p=0.5, min_p=0.1), logits.argmax(-1))


@pytest.mark.parametrize("shape", [(ROWS, VOCAB), (3, 1), (2, 5000)])
def test_greedy_is_argmax_and_minus_one_where_there_is_none(shape):
    rng = np.random.default_rng(1)
    logits = rng.integers(-9, 9, shape).astype(np.float32)
    found = jax.jit(reference.greedy)
    np.testing.assert_array_equal(found(logits), logits.argmax(-1))
    logits[0] = -np.inf
    logits[1, -1] = np.nan
    np.testing.assert_array_equal(found(logits), np.where(np.arange(shape[0]) < 2, -1, logits.argmax(-1)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_with_a_nan_or_with_everything_forbidden_gives_minus_one(sample, temperature):
    rng = np.random.default_rng(2)
    logits = logits_of_kind(rng, "usual")
    expected = sample(logits, temperature=temperature, top_p=0.9)
    allowed = np.ones((ROWS, VOCAB), bool)
    logits[3, 17] = logits[4, -1] = np.nan
    allowed[4, -1] = False  # excuses nothing
    logits[5] = -np.inf
    allowed[6] = False
    logits[7, :-1] = -np.inf
    expected[[3, 4, 5, 6]] = -1
    expected[7] = VOCAB - 1
    found = sample(logits, temperature=temperature, top_p=0.9, bitmask=bits_of(allowed))
    np.testing.assert_array_equal(found, expected)


# What a row depends on


def test_token_depends_on_logits_parameters_seed_and_position_only(sample):
    """Not on the row, nor on what the other rows hold."""
    rng = np.random.default_rng(3)
    logits, given_ = logits_of_kind(rng, "usual"), mixed(rng)
    shared = {name: given_.pop(name) for name in ("token_counts", "logit_bias")}
    together = sample(logits, **given_, **shared)
    order = rng.permutation(ROWS)
    moved = sample(logits[order], **{name: column[order] for name, column in given_.items()}, **shared)
    np.testing.assert_array_equal(moved, together[order])
    for row in range(0, ROWS, 5):
        others = np.full_like(logits, np.nan)
        others[ROWS - 1] = logits[row]
        found = sample(others, **{name: np.repeat(c[row : row + 1], ROWS, 0) for name, c in given_.items()}, **shared)
        assert found[ROWS - 1] == together[row] and (found[:-1] == -1).all()


def test_other_seed_or_other_position_is_other_noise(sample):
    flat = np.zeros((ROWS, VOCAB), np.float32)
    seeds = [sample(flat, temperature=1.0, seeds=s, positions=np.full(ROWS, 9)) for s in range(8)]
    assert all(len(set(tokens.tolist())) == 1 for tokens in seeds)
    assert len({int(tokens[0]) for tokens in seeds}) >= 7
    assert len(set(sample(flat, temperature=1.0).tolist())) >= ROWS - 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_that_adjusts_nothing_and_padding_row_read_no_slot(sample, temperature):
    logits = logits_of_kind(np.random.default_rng(4), "usual")
    poison = dict(logit_bias=np.full((SLOTS, VOCAB), np.nan), token_counts=np.full((SLOTS, VOCAB), 3))
    penalties = dict(repetition_penalty=1.3, presence_penalty=1.0, frequency_penalty=1.0)
    expected = sample(logits, temperature=temperature)
    np.testing.assert_array_equal(sample(logits, temperature=temperature, slots=2, **poison, **penalties), expected)
    np.testing.assert_array_equal(sample(logits, temperature=temperature, adjusts=1, **poison, **penalties), expected)


def test_adjusting_row_reads_its_own_slot(sample):
    logits = np.zeros((ROWS, VOCAB), np.float32)
    slots = np.arange(ROWS) % SLOTS
    bias = np.full((SLOTS, VOCAB), -np.inf)
    bias[np.arange(SLOTS), 40 * np.arange(SLOTS) + 7] = -5.0
    for temperature in (0.0, 1.0):
        found = sample(logits, temperature=temperature, adjusts=1, slots=slots, logit_bias=bias)
        np.testing.assert_array_equal(found, 40 * slots + 7)


@FEW
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.004, 1), temperature=st.sampled_from([0.0, 1.0, 50.0]))
def test_token_whose_bit_is_off_is_never_given(seed, share, temperature):
    rng = np.random.default_rng(seed)
    allowed = rng.random((ROWS, VOCAB)) < share
    allowed[np.arange(ROWS), rng.integers(0, VOCAB, ROWS)] = True
    logits = logits_of_kind(rng, "usual")
    for jitted in JITTED.values():
        tokens = run(jitted, logits, temperature=temperature, bitmask=bits_of(allowed), top_p=0.95)
        assert allowed[np.arange(ROWS), tokens].all()


# Filters


@pytest.fixture(scope="module")
def warped():
    """Probabilities left by transformers' top-k, top-p and min-p, one after another."""
    torch = pytest.importorskip("torch")
    from transformers import generation

    def warp(row, top_k=0, top_p=1.0, min_p=0.0):
        scores = torch.tensor(row)[None]
        warpers = [generation.TopKLogitsWarper(top_k)] if top_k else []
        warpers += [generation.TopPLogitsWarper(top_p)] if top_p < 1 else []
        warpers += [generation.MinPLogitsWarper(min_p)] if min_p else []
        for warper in warpers:
            scores = warper(None, scores)
        return torch.softmax(scores.double(), -1)[0].numpy()

    return warp


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 1},
        {"top_k": 20},
        {"top_p": 0.03},
        {"top_p": 0.8},
        {"top_p": 0.999},
        {"min_p": 0.4},
        {"top_k": 40, "top_p": 0.7},
        {"top_k": 30, "min_p": 0.5},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.3},
    ],
    ids=str,
)
def test_draws_are_those_tokens_that_transformers_keeps_as_often_as_they_are_likely(sample, warped, filters):
    """Pearson's chi-square over 8 x 512 draws: beyond four of its standard deviations once in ten thousand times."""
    rows, vocab = MANY
    row = distinct(np.random.default_rng(5), 1, vocab, spread=3.0)
    probability = warped(row[0], **filters)
    logits = np.repeat(row * 1.7, rows, 0)
    counted = np.zeros(vocab)
    for seed in range(8):
        counted += np.bincount(sample(logits, temperature=1.7, seeds=seed, **filters), minlength=vocab)
    kept = probability > 0
    expected = probability[kept] * counted.sum()
    assert not counted[~kept].any()
    degrees = kept.sum() - 1
    assert ((counted[kept] - expected) ** 2 / expected).sum() <= degrees + 4 * np.sqrt(2 * degrees)
    assert (counted[kept] > 0).all()


@pytest.mark.parametrize("strict", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-42}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_strictest_filter_leaves_the_likeliest_tokens(sample, strict):
    logits = logits_of_kind(np.random.default_rng(6), "tied")
    for seed in range(4):
        tokens = sample(logits, temperature=1.5, seeds=seed, **strict)
        np.testing.assert_array_equal(logits[np.arange(ROWS), tokens], logits.max(-1))


def test_ties_at_the_threshold_stay(sample):
    rows, vocab = MANY
    logits = np.full((rows, vocab), -50.0, np.float32)
    logits[:, [3, 40]] = 2.0
    logits[:, [5, 41, 69]] = 1.0
    for filters, kept in (
        ({"top_k": 1}, {3, 40}),
        ({"top_k": 3}, {3, 5, 40, 41, 69}),
        ({"top_p": 0.5}, {3, 40}),
        ({"top_p": 0.7}, {3, 5, 40, 41, 69}),
        ({"min_p": 0.3}, {3, 5, 40, 41, 69}),
    ):
        assert set(sample(logits, temperature=1.0, **filters).tolist()) == kept


# Parts of the kernel


@jax.jit
def noise_of_jax(seed, position):
    """(bits u32[1000], Gumbel noise f32[1000]) by the library."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    with jax.threefry_partitionable(True):
        return jax.random.bits(key, (1000,)), jax.random.gumbel(key, (1000,), jnp.float32, mode="low")


@jax.jit
def noise_of_ours(seed, position):
    ids = jnp.arange(1000, dtype=jnp.int32)
    key = noise.draw_key(seed, position)
    high, low = noise.threefry(key, (jnp.zeros((1000,), jnp.uint32), ids.astype(jnp.uint32)))
    return high ^ low, noise.gumbel(key, ids)


@FEW
@given(seed=st.integers(0, 2**32 - 1), position=st.integers(0, 2**31 - 1))
def test_noise_is_bit_for_bit_that_of_jax_under_its_default_settings(seed, position):
    bits, expected = noise_of_jax(np.uint32(seed), np.int32(position))
    found_bits, found = noise_of_ours(np.uint32(seed), np.int32(position))
    np.testing.assert_array_equal(found_bits, bits)
    np.testing.assert_allclose(found, expected, rtol=0 if EXACT else 1e-6)
    assert expected.min() >= noise.SMALLEST - 1e-4 and expected.max() <= noise.LARGEST + 1e-4


def test_noise_in_a_kernel_is_the_same():
    def kernel(seed, out):
        ids = jnp.arange(1024, dtype=jnp.int32)
        draw_key = noise.draw_key(compat.load(seed.at[pl.program_id(0)]), jnp.int32(77))
        compat.store(out.at[ids], noise.gumbel(draw_key, ids))

    call = compat.triton_call(
        kernel,
        name="noise",
        grid=(1,),
        out_shape=jax.ShapeDtypeStruct((1024,), jnp.float32),
        num_warps=4,
        num_stages=1,
        interpret=TRITON.interpret,
    )
    expected = noise.gumbel(noise.draw_key(jnp.uint32(5), jnp.int32(77)), jnp.arange(1024, dtype=jnp.int32))
    np.testing.assert_allclose(call(jnp.array([5], jnp.uint32)), expected, rtol=0 if EXACT else 1e-6, atol=1e-6)


def test_no_setting_of_the_process_changes_the_noise():
    expected = noise_of_ours(np.uint32(3), np.int32(4))
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        found = jax.jit(lambda *draw: noise_of_ours.__wrapped__(*draw))(np.uint32(3), np.int32(4))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 2).filter(lambda pair: pair[0] != pair[1])
)
def test_middle_lies_above_low_and_not_above_high(pair):
    low, high = sorted(np.float32(pair))
    middle = settle.middle(jnp.float32(low), jnp.float32(high))
    order = lambda x: np.where(np.signbit(x), -1, 1) * np.int64(np.abs(x).view(np.int32))  # noqa: E731
    assert order(low) < order(np.float32(middle)) <= order(high)


@FEW
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["usual", "flat", "tied", "wild"]),
    wanted=st.integers(1, VOCAB),
)
def test_settle_finds_the_largest_threshold_in_64_passes(seed, kind, wanted):
    values = np.maximum(logits_of_kind(np.random.default_rng(seed), kind)[0], -1e35)
    passes = 0

    def tally_at(threshold):
        nonlocal passes
        passes += 1
        return settle.reduce(settle.tally(values, np.ones_like(values), threshold))

    with jax.disable_jit():
        low, high = jnp.float32(np.finfo(np.float32).min), jnp.float32(values.max())
        found = settle.settle(tally_at, low, high, jnp.float32(VOCAB), jnp.float32(wanted))
    expected = np.sort(values)[-wanted]
    assert (values >= np.float32(found)).sum() == (values >= expected).sum()
    assert passes <= 64


# Compiled


@pytest.mark.parametrize(("rows", "vocab"), [(1, 128256), (256, 151936), (8, 50257), (64, 257)])
def test_kernel_lowers_for_a_gpu(rows, vocab):
    backend = Backend("triton", device="NVIDIA H200")
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, arguments(rows, vocab)))
    logits = jax.ShapeDtypeStruct((rows, vocab), jnp.float32)
    with compat.abstract_gpu():
        traced = jax.jit(lambda x, given: api.sample(x, **given, backend=backend)).trace(logits, shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call") == 1 and "triton" in text


def test_backend_that_does_not_exist_is_refused():
    assert api.unsupported(REFERENCE) == api.unsupported(TRITON) == ""
    assert "mosaic" in api.unsupported(Backend("mosaic"))
