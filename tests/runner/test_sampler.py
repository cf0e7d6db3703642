"""Logits to tokens: penalties, bans, mixed batches, NaN, log probabilities, against NumPy, torch and transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.batch import SamplingState, SlotState
from jaxserve.request import SamplingParams
from jaxserve.runner import sampler
from jaxserve.runner.layout import NUMPY_DTYPES, SAMPLING_FIELDS
from jaxserve.runner.slot_params import SlotParams
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.sampling import api

ROWS, VOCAB = 16, 70
WORDS = -(-VOCAB // 32)
OFF = {"top_p": 1.0, "repetition_penalty": 1.0}  # fields whose neutral value is not 0

SAMPLERS = {
    backend.name: jax.jit(functools.partial(sampler.sample, sample=functools.partial(api.sample, backend=backend)))
    for backend in (REFERENCE, Backend("triton", interpret=jax.default_backend() == "cpu"))
}
count_tokens = jax.jit(sampler.count_tokens)
token_logprobs = jax.jit(sampler.token_logprobs, static_argnums=2)


def random_logits(seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, (ROWS, VOCAB)).astype(np.float32)


def state(**columns):
    """SamplingState of ROWS rows; everything off but `columns`."""
    fields = {name: np.full(ROWS, OFF.get(name, 0), NUMPY_DTYPES[dtype]) for name, dtype in SAMPLING_FIELDS}
    for name, value in columns.items():
        fields[name][:] = value
    return SamplingState(prompt_targets=np.zeros(0, np.int32), **fields)


@pytest.fixture(params=SAMPLERS)
def run(request):
    """i32[ROWS] = run(logits, sampling); row r is in slot r unless `slots` says otherwise."""

    def run(logits, sampling, *, counts=None, bias=None, slots=None, positions=None, mask=None):
        slot_state = SlotState(
            last_token=np.zeros(ROWS, np.int32),
            page_table=np.zeros((ROWS, 1), np.int32),
            token_counts=np.zeros((ROWS, VOCAB), np.int32) if counts is None else counts,
            logit_bias=np.zeros((ROWS, VOCAB), np.float32) if bias is None else bias,
        )
        slots = np.arange(ROWS, dtype=np.int32) if slots is None else slots
        positions = np.arange(ROWS, dtype=np.int32) if positions is None else positions
        mask = np.full((ROWS, WORDS), 0xFFFFFFFF, np.uint32) if mask is None else mask
        return np.asarray(SAMPLERS[request.param](logits, sampling, slot_state, slots, positions, mask))

    return run


def histories(make_sequence, **sampling):
    """(sequences in slots 0..ROWS-1 with prompts and generated tokens, their counts i32, their biases f32)."""
    rng = np.random.default_rng(4)
    sequences = []
    for slot in range(ROWS):
        prompt, generated = rng.integers(0, VOCAB, 8).tolist(), rng.integers(0, VOCAB, 3 * slot).tolist()
        sequences.append(make_sequence(prompt, generated + generated[:5], slot=slot, **sampling))
    params = SlotParams(ROWS, VOCAB)
    counts, bias = zip(*(params.logit_row(sequence) for sequence in sequences), strict=True)
    return sequences, np.stack(counts), np.stack(bias)


def near_ties(seed):
    """Logits so close together that any penalty decides who wins, above and below zero."""
    return random_logits(seed, scale=0.3)


# Penalties and biases


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_equals_transformers(run, make_sequence, penalty):
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    sequences, counts, _ = histories(make_sequence, repetition_penalty=penalty)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    changed = 0
    for seed in range(8):
        logits = near_ties(seed)
        expected = [
            int(processor(torch.tensor([s.tokens]), torch.tensor(row[None])).argmax())
            for s, row in zip(sequences, logits, strict=True)
        ]
        assert run(logits, state(adjusts=1, repetition_penalty=penalty), counts=counts).tolist() == expected
        changed += (logits.argmax(-1) != expected).sum()
    assert changed > 20, "the penalty decided nothing"


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.2), (-0.3, 0.4), (1.0, -1.0)])
def test_presence_and_frequency_penalties_follow_the_openai_formula_on_generated_tokens(
    run, make_sequence, presence, frequency
):
    sequences, counts, _ = histories(make_sequence, presence_penalty=presence, frequency_penalty=frequency)
    generated = np.stack([np.bincount(s.tokens[s.num_prompt :], minlength=VOCAB) for s in sequences])
    assert generated.max() > 1
    for seed in range(8):
        logits = near_ties(seed)
        expected = (logits - frequency * generated - presence * (generated > 0)).argmax(-1)
        sampling = state(adjusts=1, presence_penalty=presence, frequency_penalty=frequency)
        np.testing.assert_array_equal(run(logits, sampling, counts=counts), expected)


def test_tokens_counted_on_the_device_equal_those_the_host_counts(make_sequence):
    """Step by step and from scratch (as after a preemption) are the same penalties."""
    rng = np.random.default_rng(0)
    prompt, generated = rng.integers(0, VOCAB, 9).tolist(), rng.integers(0, 6, 30).tolist()
    params = SlotParams(1, VOCAB)
    start, _ = params.logit_row(make_sequence(prompt))
    counts = np.stack([start, start])
    for token in generated:
        slot_state = SlotState(np.zeros(2, np.int32), np.zeros((2, 1), np.int32), counts, np.zeros((2, VOCAB)))
        counts = count_tokens(slot_state, np.array([0, 1], np.int32), np.array([token] * 2), np.array([1, 0]))
    whole, _ = params.logit_row(make_sequence(prompt, generated))
    np.testing.assert_array_equal(counts[0], whole)
    np.testing.assert_array_equal(counts[1], start)  # a row without penalties is not counted


def test_padding_rows_and_nan_tokens_are_not_counted():
    slot_state = SlotState(np.zeros(2), np.zeros((2, 1)), np.zeros((2, VOCAB), np.int32), np.zeros((2, VOCAB)))
    slots, tokens = np.array([2, 1, 2], np.int32), np.array([3, -1, -1], np.int32)
    assert not np.asarray(count_tokens(slot_state, slots, tokens, np.ones(3, np.int32))).any()


def test_row_without_penalties_ignores_what_its_slot_holds(run):
    """A slot's row is written only for sequences that need it; others find what the last one left."""
    logits = random_logits()
    counts = np.full((ROWS, VOCAB), 5, np.int32)
    bias = np.full((ROWS, VOCAB), -np.inf, np.float32)
    adjusts = np.arange(ROWS) % 2
    sampling = state(adjusts=adjusts, presence_penalty=adjusts)
    tokens = run(logits, sampling, counts=counts, bias=np.where(np.arange(VOCAB) == 3, 0, bias).astype(np.float32))
    np.testing.assert_array_equal(tokens, np.where(adjusts, 3, logits.argmax(-1)))


def test_padding_row_reads_no_slot(run):
    slots = np.full(ROWS, ROWS, np.int32)
    logits = random_logits()
    tokens = run(logits, state(adjusts=1), slots=slots, bias=np.full((ROWS, VOCAB), -np.inf, np.float32))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_are_never_chosen_and_biased_ones_are(run, make_sequence, temperature):
    logits = random_logits()
    best = logits.argsort(-1)[:, ::-1]
    mine = [
        {"logit_bias": {int(best[0, 9]): 100}},
        {"allowed_token_ids": best[1, 40:43].tolist()},
        {"bad_words": ((int(best[2, 0]),),)},
        {"allowed_token_ids": best[3, 50:52].tolist(), "bad_words": ((int(best[3, 50]),),)},
        {"logit_bias": {int(best[4, 0]): 100}, "bad_words": ((int(best[4, 0]),),)},
    ]
    params = SlotParams(ROWS, VOCAB)
    bias = np.zeros((ROWS, VOCAB), np.float32)
    for slot, sampling in enumerate(mine):
        sequence = make_sequence([1], slot=slot, **sampling)
        assert params.admit(sequence)
        _, bias[slot] = params.logit_row(sequence)
    for position in range(6):
        sampling = state(adjusts=1, temperature=temperature, seeds=3)
        tokens = run(logits, sampling, bias=bias, positions=np.full(ROWS, position, np.int32))
        assert tokens[0] == best[0, 9]
        assert tokens[1] in best[1, 40:43]
        assert tokens[2] != best[2, 0] and tokens[4] != best[4, 0]
        assert tokens[3] == best[3, 51]
        if not temperature:
            assert tokens[2] == best[2, 1] and tokens[4] == best[4, 1]
            np.testing.assert_array_equal(tokens[5:], best[5:, 0])


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_bitmask_bans_exactly_the_tokens_whose_bit_is_off(run, temperature):
    rng = np.random.default_rng(1)
    allowed = rng.random((ROWS, VOCAB)) < 0.2
    allowed[:, 69] |= ~allowed.any(-1)  # the last token of an incomplete word
    allowed[0] = np.arange(VOCAB) == 31
    allowed[1] = np.arange(VOCAB) == 32
    allowed[2] = np.arange(VOCAB) == 69
    bits = np.pad(allowed, ((0, 0), (0, 32 * WORDS - VOCAB)))
    mask = np.packbits(bits, axis=-1, bitorder="little").view("<u4")
    for seed in range(4):
        logits = random_logits(seed)
        tokens = run(logits, state(temperature=temperature, seeds=seed), mask=mask)
        assert allowed[np.arange(ROWS), tokens].all() and tokens[:3].tolist() == [31, 32, 69]
        if not temperature:
            np.testing.assert_array_equal(tokens, np.where(allowed, logits, -np.inf).argmax(-1))


# Rows are independent


def mixed_columns():
    """Columns of ROWS rows that differ in every way."""
    rng = np.random.default_rng(6)
    return {
        "temperature": np.where(np.arange(ROWS) % 3 == 0, 0.0, rng.uniform(0.3, 2.0, ROWS)),
        "top_p": np.where(np.arange(ROWS) % 2 == 0, 1.0, 0.8),
        "top_k": np.arange(ROWS) % 4 * 5,
        "min_p": np.where(np.arange(ROWS) % 5 == 0, 0.05, 0.0),
        "seeds": rng.integers(0, 2**32, ROWS, dtype=np.uint32),
        "adjusts": np.arange(ROWS) % 2,
        "repetition_penalty": np.where(np.arange(ROWS) % 4 == 1, 1.5, 1.0),
        "presence_penalty": np.where(np.arange(ROWS) % 4 == 3, 0.7, 0.0),
    }


def test_greedy_row_beside_sampled_ones_equals_argmax(run):
    logits = random_logits()
    columns = {**mixed_columns(), "adjusts": 0}
    tokens = run(logits, state(**columns))
    greedy = columns["temperature"] == 0
    np.testing.assert_array_equal(tokens[greedy], logits.argmax(-1)[greedy])
    assert (tokens[~greedy] != logits.argmax(-1)[~greedy]).any()
    np.testing.assert_array_equal(sampler.greedy(logits), logits.argmax(-1))


def test_row_beside_others_equals_the_row_beside_neutral_ones(run):
    logits, columns = random_logits(), mixed_columns()
    counts = np.random.default_rng(2).integers(0, 3, (ROWS, VOCAB)).astype(np.int32)
    together = run(logits, state(**columns), counts=counts)
    for r in range(ROWS):
        only = {name: np.where(np.arange(ROWS) == r, column, OFF.get(name, 0)) for name, column in columns.items()}
        blank = np.where(np.arange(ROWS)[:, None] == r, logits, 0).astype(np.float32)
        assert run(blank, state(**only), counts=counts)[r] == together[r]


@pytest.mark.parametrize("bad", [np.nan, -np.nan])
def test_nan_row_yields_minus_one_and_leaves_the_others_alone(run, bad):
    clean, columns = random_logits(), mixed_columns()
    dirty = clean.copy()
    dirty[3, 0] = dirty[7, 69] = bad
    dirty[9] = bad
    hit = np.isin(np.arange(ROWS), [3, 7, 9])
    mask = np.full((ROWS, WORDS), 0xFFFFFFFF, np.uint32)
    mask[7, 2] = 0  # that the NaN is at a banned token excuses nothing
    for given in (None, mask):
        expected = np.where(hit, -1, run(clean, state(**columns), mask=given))
        np.testing.assert_array_equal(run(dirty, state(**columns), mask=given), expected)
    np.testing.assert_array_equal(sampler.greedy(dirty), np.where(hit, -1, clean.argmax(-1)))


def test_top_p_below_any_float32_leaves_the_likeliest_token(run):
    logits = random_logits()
    tokens = run(logits, state(temperature=1.0, top_p=np.float32(SamplingParams(top_p=1e-50).top_p), seeds=1))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


# Log probabilities


@pytest.mark.parametrize("top", [0, 1, 5, 65])
def test_token_logprobs_equal_torch_log_softmax(top):
    torch = pytest.importorskip("torch")
    logits = random_logits()
    logits[2, 5:] = -np.inf
    tokens = np.random.default_rng(0).integers(0, 5, ROWS).astype(np.int32)
    found = token_logprobs(logits, tokens, top)
    truth = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    np.testing.assert_allclose(found.chosen, truth[np.arange(ROWS), tokens], atol=2e-6)
    order = np.argsort(-truth, axis=-1, kind="stable")
    np.testing.assert_array_equal(found.rank, 1 + (order == tokens[:, None]).argmax(-1))
    assert found.top.shape == found.top_ids.shape == (ROWS, top)
    np.testing.assert_array_equal(found.top_ids, order[:, :top])
    np.testing.assert_allclose(found.top, np.take_along_axis(truth, order[:, :top], 1), atol=2e-6)


def test_rank_counts_only_the_strictly_likelier():
    logits = np.zeros((2, VOCAB), np.float32)
    logits[1, 4] = 1
    assert token_logprobs(logits, np.array([60, 60], np.int32), 2).rank.tolist() == [1, 2]


@pytest.mark.parametrize("num_tokens", [1, 64, 150])
def test_prompt_logprobs_in_chunks_equal_the_whole_prompts(num_tokens):
    rng = np.random.default_rng(0)
    hidden = rng.normal(0, 1, (num_tokens, 12)).astype(np.float32)
    head = jnp.asarray(rng.normal(0, 1, (12, VOCAB)).astype(np.float32))
    targets = rng.integers(0, VOCAB, num_tokens).astype(np.int32)
    targets[::3] = -1
    targets[64:128] = -1  # a chunk in which nothing is wanted
    if num_tokens == 1:
        targets[:] = 5
    logits_of = lambda h: jnp.dot(h, head, precision="highest")  # noqa: E731
    found = jax.jit(lambda h, t: sampler.prompt_logprobs(h, t, logits_of, 3))(hidden, targets)
    whole = token_logprobs(logits_of(hidden), targets, 3)
    wanted = targets >= 0
    assert wanted.any()
    for part, expected in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        assert part.shape == expected.shape
        np.testing.assert_allclose(np.asarray(part)[wanted], np.asarray(expected)[wanted], atol=1e-5)
    assert not np.asarray(found.chosen)[64:128].any()
