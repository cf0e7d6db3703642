"""Sampling as one Pallas-Triton kernel: a program per row, which reads a row of logits twice and sorts nothing.

    1  look     all V logits       the likeliest token, any NaN, and the maxima of BLOCK interleaved classes ("lanes")
    2  gather   all V logits       ids of the tokens above a floor: all that a filter may keep or the noise may lift
    3  settle   candidates only    thresholds of top-k, then top-p, then min-p
    4  draw     candidates only    Gumbel noise and arg-max

A greedy row ends after 1. What makes 3 and 4 short is the floor, which is found without another look at the row: the
k-th largest lane maximum is no larger than the k-th largest logit, and lanes that hold p hold no more of it than the
row does. Logits after bias, penalties and temperature are not stored: to write and read f32[R, V] costs more than to
process them again.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, tuning
from pallas_kernels.backend import Backend
from pallas_kernels.sampling import noise, settle
from pallas_kernels.sampling.adjust import ALL_ALLOWED, adjust, forbid

OP = "sampling"
LOWEST = float(np.finfo(np.float32).min)
REACH = noise.LARGEST - noise.SMALLEST + 0.1  # further below the likeliest token no noise can lift another one

Load = Callable[[Array, Array], Array]  # (token ids, which are real) -> raw logits, -inf where not real
Process = Callable[[Array, Array, Array], Array]  # (raw logits, token ids, which are real) -> what is sampled from
Weigh = Callable[[Array, Array, Array], Array]  # (weight so far, new values, largest values so far) -> weight
Over = Callable[[Callable[..., Any], Any], Any]  # (step, state) -> state after all blocks of the row, or of candidates


@dataclass(frozen=True)
class Keep:
    """The filters of one row, all scalars."""

    k: Array  # i32[]
    p: Array  # f32[]
    m: Array  # f32[] min-p
    vocab: int

    @property
    def by_k(self) -> Array:
        return (self.k > 0) & (self.k < self.vocab)

    @property
    def by_p(self) -> Array:
        return self.p < 1.0


@dataclass(frozen=True)
class Config:
    """Launch configuration.

    block: tokens looked at together, a power of two; also the number of lanes. More than 8 for a thread spill.
    num_warps: of a program. Few rows want wide programs, since a row is one program's work.
    """

    block: int
    num_warps: int


def key(rows: int, vocab: int) -> dict[str, int | str]:
    """What a tuned configuration is looked up by."""
    return {"rows": pl.next_power_of_2(rows), "vocab": vocab}


def candidates(vocab: int) -> list[Config]:
    """What a tuner should try: narrower programs spill on Hopper, where the assembler wants more of them on a core."""
    configs = Config(block=2048, num_warps=8), Config(block=4096, num_warps=16)
    return [config for config in configs if config.block < 2 * vocab]


def choose(rows: int, vocab: int, backend: Backend) -> Config:
    """The tuned configuration, else a guess: wide programs until every core has one, then two programs a core."""
    block = min(4096 if rows <= backend.num_cores else 2048, max(256, pl.next_power_of_2(vocab)))
    heuristic = Config(block=block, num_warps=block // 256)
    return tuning.choose(OP, backend.device, key(rows, vocab), heuristic)


def sample(
    logits: Array,
    *,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seeds: Array,
    positions: Array,
    bitmask: Array,
    adjusts: Array,
    slots: Array,
    token_counts: Array,
    logit_bias: Array,
    repetition_penalty: Array,
    presence_penalty: Array,
    frequency_penalty: Array,
    config: Config,
    interpret: bool,
) -> Array:
    """As in `api.py`; allocates i32[R, V] for the ids of candidates."""
    rows, vocab = logits.shape
    kernel = functools.partial(
        _sample_kernel,
        vocab=vocab,
        num_slots=token_counts.shape[0],
        block=config.block,
        interpret=interpret,
    )
    tokens, _ = compat.triton_call(
        kernel,
        name="sample",
        grid=(rows,),
        out_shape=(jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows, vocab), jnp.int32)),
        num_warps=config.num_warps,
        num_stages=1,
        interpret=interpret,
    )(
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        positions,
        bitmask,
        adjusts,
        slots,
        token_counts,
        logit_bias,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
    )
    return tokens


def _sample_kernel(
    logits: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    seeds: Any,
    positions: Any,
    bitmask: Any,
    adjusts: Any,
    slots: Any,
    token_counts: Any,
    logit_bias: Any,
    repetition_penalty: Any,
    presence_penalty: Any,
    frequency_penalty: Any,
    tokens: Any,
    candidate_ids: Any,
    *,
    vocab: int,
    num_slots: int,
    block: int,
    interpret: bool,
) -> None:
    row = pl.program_id(0)
    slot = compat.load(slots.at[row])
    row_adjusts = (compat.load(adjusts.at[row]) == 1) & (slot < num_slots)
    row_forbids = _forbids(bitmask, row)
    heat = compat.load(temperature.at[row])

    def load(ids: Array, real: Array) -> Array:
        return compat.load(logits.at[row, ids], mask=real, other=-jnp.inf)

    def forbidden(x: Array, ids: Array, real: Array) -> Array:
        return forbid(x, compat.load(bitmask.at[row, ids >> 5], mask=real, other=0), ids)

    def adjusted(x: Array, ids: Array, real: Array) -> Array:
        count = compat.load(token_counts.at[slot, ids], mask=real, other=0)
        bias = compat.load(logit_bias.at[slot, ids], mask=real, other=0.0)
        penalties = (repetition_penalty, presence_penalty, frequency_penalty)
        return adjust(x, count, bias, *(compat.load(penalty.at[row]) for penalty in penalties))

    def process(raw: Array, ids: Array, real: Array) -> Array:
        x = lax.cond(row_forbids, forbidden, lambda x, *_: x, raw, ids, real)
        return lax.cond(row_adjusts, adjusted, lambda x, *_: x, x, ids, real)

    keep = Keep(compat.load(top_k.at[row]), compat.load(top_p.at[row]), compat.load(min_p.at[row]), vocab)
    sums = (heat > 0.0) & keep.by_p & ~keep.by_k

    def weigh(weight: Array, x: Array, best: Array) -> Array:
        """Sum of exp(logit / temperature) in units of that of the lane's largest logit, which x may become."""

        def add() -> Array:
            fall = jnp.exp(-jnp.abs(x - best) / heat)
            return jnp.where(x == -jnp.inf, weight, jnp.where(x > best, weight * fall + 1.0, weight + fall))

        return lax.cond(sums, add, lambda: weight)

    over_row = functools.partial(_over_row, load=load, vocab=vocab, block=block)
    best, token, weight, has_nan = _look(over_row, process, weigh, block)
    hopeless, likeliest = _hopeless(best, has_nan), _first_largest(best, token)

    def drawn() -> Array:
        def scaled(raw: Array, ids: Array, real: Array) -> Array:
            return process(raw, ids, real) / heat

        lanes = best / heat
        peak = jnp.max(lanes)
        total = jnp.sum(weight * jnp.exp(lanes - peak))
        floor = _floor(lanes, peak, total, keep)
        count = _gather(over_row, scaled, candidate_ids, row, floor, block)
        if not interpret:
            compat.barrier()  # ids are read by other threads than those that wrote them

        def over_candidates(step: Callable[..., Any], state: Any) -> Any:
            """step(values, ids, state) -> state over all blocks of candidates in order."""

            def advance(i: Array, state: Any) -> Any:
                place = i * block + jnp.arange(block, dtype=jnp.int32)
                real = place < count
                ids = compat.load(candidate_ids.at[row, place], mask=real, other=0)
                return step(scaled(load(ids, real), ids, real), ids, state)

            return lax.fori_loop(0, pl.cdiv(count, block), advance, state)

        threshold = _threshold(over_candidates, count, total, floor, peak, keep, block)
        draw_key = noise.draw_key(compat.load(seeds.at[row]), compat.load(positions.at[row]))
        return _draw(over_candidates, threshold, draw_key, likeliest, block)

    chosen = lax.cond((heat > 0.0) & ~hopeless, drawn, lambda: likeliest)
    compat.store(tokens.at[row], jnp.where(hopeless, -1, chosen))


def _any(flags: Array) -> Array:
    return jnp.max(flags.astype(jnp.int32)) > 0


def _forbids(bitmask: Any, row: Array) -> Array:
    """bool[] whether some word of the row's bitmask is not all ones."""
    words = bitmask.shape[1]
    block = min(4096, pl.next_power_of_2(words))

    def scan(i: Array, forbids: Array) -> Array:
        place = i * block + jnp.arange(block, dtype=jnp.int32)
        word = compat.load(bitmask.at[row, place], mask=place < words, other=ALL_ALLOWED)
        return forbids | (word != ALL_ALLOWED)

    return _any(lax.fori_loop(0, pl.cdiv(words, block), scan, jnp.zeros((block,), jnp.bool_)))


def _over_row(step: Callable[..., Any], state: Any, *, load: Load, vocab: int, block: int) -> Any:
    """step(raw logits, ids, which are real, state) -> state over all blocks of the vocabulary in order.

    A block is loaded while the one before it is worked on: a row has but one program to hide latency.
    """

    def block_of(i: Array | int) -> tuple[Array, Array]:
        ids = i * block + jnp.arange(block, dtype=jnp.int32)
        return ids, ids < vocab

    def advance(i: Array, state: Any) -> Any:
        raw, state = state
        return load(*block_of(i + 1)), step(raw, *block_of(i), state)

    return lax.fori_loop(0, pl.cdiv(vocab, block), advance, (load(*block_of(0)), state))[1]


def _look(over_row: Over, process: Process, weigh: Weigh, block: int) -> tuple[Array, Array, Array, Array]:
    """Per lane, [block]: (the largest processed logit, its first token, what `weigh` made, whether a NaN came by)."""

    def step(raw: Array, ids: Array, real: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        best, token, weight, has_nan = state
        x = process(raw, ids, real)
        larger = x > best
        weight = weigh(weight, x, best)
        return jnp.where(larger, x, best), jnp.where(larger, ids, token), weight, has_nan | (raw != raw)

    lowest, zero = jnp.full((block,), -jnp.inf, jnp.float32), jnp.zeros((block,), jnp.float32)
    nothing = lowest, jnp.zeros((block,), jnp.int32), zero, jnp.zeros((block,), jnp.bool_)
    return over_row(step, nothing)


def _first_largest(best: Array, token: Array) -> Array:
    """i32[] the smallest token of those that hold the largest value."""
    return jnp.min(jnp.where(best == jnp.max(best), token, np.int32(2**31 - 1)))


def _hopeless(best: Array, has_nan: Array) -> Array:
    return _any(has_nan) | (jnp.max(best) == -jnp.inf)


def _floor(lanes: Array, peak: Array, total: Array, keep: Keep) -> Array:
    """f32[] a value that nothing the filters keep, and nothing the noise could make the winner, lies below.

    What top-k and top-p keep of the lanes' maxima alone they keep of the row, of which there is more above any value.
    """

    def settle_lanes(weight: Array, low: Array, wanted: Array) -> Array:
        def tally_at(threshold: Array) -> settle.Tally:
            return settle.reduce(settle.tally(lanes, weight, threshold))

        return settle.settle(tally_at, low, peak, tally_at(low)[0], wanted)

    def of_top_k() -> Array:
        return settle_lanes(jnp.ones_like(lanes), jnp.float32(LOWEST), keep.k.astype(jnp.float32))

    def of_top_p() -> Array:
        # All tokens less likely than (1 - p) / V hold less than 1 - p together; 1 is more than all roundings.
        low = peak + jnp.log(total * (1.0 - keep.p) / keep.vocab) - 1.0
        return settle_lanes(jnp.exp(lanes - peak), low, keep.p * total)

    def of_noise() -> Array:
        return jnp.maximum(peak - REACH, peak + jnp.log(keep.m))

    floor = lax.cond(keep.by_k, of_top_k, lambda: lax.cond(keep.by_p, of_top_p, of_noise))
    return jnp.maximum(floor, LOWEST)


def _gather(over_row: Over, scaled: Process, candidate_ids: Any, row: Array, floor: Array, block: int) -> Array:
    """i32[] number of tokens whose value is at least floor; their ids are now in candidate_ids, in order."""

    def step(raw: Array, ids: Array, real: Array, count: Array) -> Array:
        keeps = scaled(raw, ids, real) >= floor
        num_kept = jnp.sum(keeps.astype(jnp.int32))

        @pl.when(num_kept > 0)
        def _() -> None:
            rank = jnp.cumsum(keeps.astype(jnp.int32))
            # Lanes that store nothing have places of their own too: interpreted, they write back what was there.
            rest = num_kept + jnp.arange(block, dtype=jnp.int32) - rank
            compat.store(candidate_ids.at[row, count + jnp.where(keeps, rank - 1, rest)], ids, mask=keeps)

        return count + num_kept

    return over_row(step, jnp.int32(0))


def _threshold(
    over_candidates: Over, count: Array, total: Array, floor: Array, peak: Array, keep: Keep, block: int
) -> Array:
    """f32[] the smallest value that top-k, then top-p, then min-p keep."""

    def tally_at(threshold: Array, weigh: Callable[[Array], Array]) -> settle.Tally:
        def step(x: Array, ids: Array, state: settle.Tally) -> settle.Tally:
            return settle.merge(state, settle.tally(x, weigh(x), threshold))

        amount, smallest, largest = (jnp.full((block,), value, jnp.float32) for value in (0.0, jnp.inf, -jnp.inf))
        return settle.reduce(over_candidates(step, (amount, smallest, largest)))

    def by_top_k() -> Array:
        num_tokens = functools.partial(tally_at, weigh=jnp.ones_like)
        return settle.settle(num_tokens, floor, peak, count.astype(jnp.float32), keep.k.astype(jnp.float32))

    def by_top_p() -> Array:
        weight = functools.partial(tally_at, weigh=lambda x: jnp.exp(x - peak))
        amount = weight(threshold)[0]
        return settle.settle(weight, threshold, peak, amount, keep.p * jnp.where(keep.by_k, amount, total))

    threshold = lax.cond(keep.by_k, by_top_k, lambda: floor)
    threshold = lax.cond(keep.by_p, by_top_p, lambda: threshold)
    return jnp.maximum(threshold, peak + jnp.log(keep.m))


def _draw(over_candidates: Over, threshold: Array, draw_key: noise.Words, likeliest: Array, block: int) -> Array:
    """i32[] the candidate from threshold upwards of the largest value plus noise, the first one on ties.

    likeliest: i32[] the token where no candidate is left, should a value round otherwise each time it is computed.
    """

    def step(x: Array, ids: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        best, token = state

        def contest() -> tuple[Array, Array]:
            score = jnp.where(x >= threshold, x + noise.gumbel(draw_key, ids), -jnp.inf)
            larger = score > best
            return jnp.where(larger, score, best), jnp.where(larger, ids, token)

        return lax.cond(jnp.max(x) >= threshold, contest, lambda: (best, token))

    nothing = jnp.full((block,), -jnp.inf, jnp.float32), jnp.full((block,), likeliest, jnp.int32)
    return _first_largest(*over_candidates(step, nothing))
