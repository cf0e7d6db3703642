"""Sampling in plain JAX: logits f32[R, V] to tokens i32[R]; every row is independent of its neighbours.

Work that no row of a step asked for is skipped by `lax.cond`, one predicate per paragraph.

Nothing here sorts the vocabulary. A filter is a threshold: the number of (or the probability held by) logits above a
value falls as the value rises, so the exact threshold is found by bisection over the 2^32 ordered bit patterns of a
float32, 32 counting passes whatever the vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.sampling import noise
from pallas_kernels.sampling.adjust import ALL_ALLOWED, adjust, forbid

BLOCK = 64
EXCLUDED = -jnp.inf


def greedy(logits: Array) -> Array:
    """As in `api.py`."""
    tokens = argmax(logits)
    best = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return jnp.where(_has_nan(logits) | (best == -jnp.inf), -1, tokens)


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
) -> Array:
    """As in `api.py`."""
    any_forbids = jnp.any(bitmask != ALL_ALLOWED)
    any_adjusts = jnp.any(adjusts == 1)
    drawn_rows = temperature > 0.0
    any_draws = jnp.any(drawn_rows)

    def forbidden(x: Array) -> Array:
        token = jnp.arange(x.shape[1], dtype=jnp.int32)
        return forbid(x, bitmask[:, token // 32], token)

    def adjusted(x: Array) -> Array:
        counts = token_counts.at[slots].get(mode="fill", fill_value=0)
        bias = logit_bias.at[slots].get(mode="fill", fill_value=0.0)
        penalties = (p[:, None] for p in (repetition_penalty, presence_penalty, frequency_penalty))
        return jnp.where(adjusts[:, None] == 1, adjust(x, counts, bias, *penalties), x)

    def drawn(x: Array) -> Array:
        scaled = x / jnp.where(drawn_rows, temperature, 1.0)[:, None]
        # A greedy row needs no filter; off, it cannot make the whole batch pay for one.
        k, p, m = jnp.where(drawn_rows, top_k, 0), jnp.where(drawn_rows, top_p, 1.0), jnp.where(drawn_rows, min_p, 0.0)
        scaled = lax.cond(jnp.any(k > 0), lambda x: keep_top_k(x, k), lambda x: x, scaled)
        scaled = lax.cond(jnp.any(p < 1.0), lambda x: keep_top_p(x, p), lambda x: x, scaled)
        scaled = lax.cond(jnp.any(m > 0.0), lambda x: keep_min_p(x, m), lambda x: x, scaled)
        return jnp.where(drawn_rows, draw(scaled, seeds, positions), argmax(x))

    def sample_any(x: Array) -> Array:
        bad = _has_nan(x)
        with jax.named_scope("forbid"):
            x = lax.cond(any_forbids, forbidden, lambda x: x, x)
        with jax.named_scope("bias_and_penalties"):
            x = lax.cond(any_adjusts, adjusted, lambda x: x, x)
        with jax.named_scope("draw"):
            tokens = lax.cond(any_draws, drawn, argmax, x)
        # A row in which everything is forbidden has no token to give, least of all a forbidden one.
        return jnp.where(bad | (x.max(-1) == -jnp.inf), -1, tokens)

    return lax.cond(any_forbids | any_adjusts | any_draws, sample_any, greedy, logits)


def argmax(logits: Array) -> Array:
    """i32[R] index of each row's largest value, the first one on ties.

    Two short reductions in place of one long one: XLA on CPU vectorises a maximum but not an argmax.
    """
    blocks = _blocks(logits)
    block = jnp.argmax(blocks.max(-1), -1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * BLOCK + jnp.argmax(inside, -1)).astype(jnp.int32)


def top_k(logits: Array, k: int) -> tuple[Array, Array]:
    """(f32[R, k] values, i32[R, k] indices) of the k largest, largest first, lower index first on ties.

    The k blocks with the largest maxima hold the k largest values, so only k * 64 candidates are ever sorted.
    """
    blocks = _blocks(logits)
    k_blocks = min(k, blocks.shape[1])
    # Blocks in index order keep ties between equal values in index order too.
    chosen = jnp.sort(lax.top_k(blocks.max(-1), k_blocks)[1], -1)
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1).reshape(logits.shape[0], -1)
    values, where = lax.top_k(candidates, k)
    block = jnp.take_along_axis(chosen, where // BLOCK, axis=1)
    return values, (block * BLOCK + where % BLOCK).astype(jnp.int32)


def rank(logits: Array, value: Array) -> Array:
    """i32[R] 1-based rank of `value` f32[R] within its row: one more than the count of strictly larger logits."""
    return jnp.sum(logits > value[:, None], -1, dtype=jnp.int32) + 1


def _has_nan(logits: Array) -> Array:
    """bool[R]; XLA's maximum on CPU may lose a NaN, so the largest logit does not tell."""
    return jnp.any(jnp.isnan(logits), -1)


def _blocks(logits: Array) -> Array:
    """[R, V] as [R, V/64, 64], padded with -inf."""
    rows, vocab = logits.shape
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % BLOCK)), constant_values=EXCLUDED)
    return padded.reshape(rows, -1, BLOCK)


def _ordered_bits(x: Array) -> Array:
    """u32 with the order of the floats: sign-magnitude becomes unsigned."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))


def _largest_threshold(keeps_enough: Callable[[Array], Array], num_rows: int) -> Array:
    """u32[R] the largest threshold t for which keeps_enough(t) (bool[R], falling in t) still holds."""

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # keeps_enough(low) holds, keeps_enough(high + 1) does not
        middle = low + (high - low) // 2 + (high - low) % 2
        enough = keeps_enough(middle)
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low = jnp.zeros((num_rows,), jnp.uint32)
    high = jnp.full((num_rows,), 0xFFFFFFFF, jnp.uint32)
    return lax.fori_loop(0, 32, halve, (low, high))[0]


def keep_top_k(logits: Array, k: Array) -> Array:
    """Logits with all but each row's k largest at -inf; k i32[R], 0 or less keeps all. Ties at the threshold stay."""
    bits = _ordered_bits(logits)

    def at_least_k(threshold: Array) -> Array:
        return jnp.sum(bits >= threshold[:, None], -1, dtype=jnp.int32) >= k

    threshold = _largest_threshold(at_least_k, logits.shape[0])
    return jnp.where((bits >= threshold[:, None]) | (k <= 0)[:, None], logits, EXCLUDED)


def keep_top_p(logits: Array, p: Array) -> Array:
    """Logits outside the smallest set whose probability reaches p (f32[R]) at -inf; 1 keeps all.

    Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration". Ties at the threshold stay.
    """
    bits = _ordered_bits(logits)
    weights = jax.nn.softmax(logits, axis=-1)

    def holds_p(threshold: Array) -> Array:
        return jnp.sum(jnp.where(bits >= threshold[:, None], weights, 0.0), -1) >= p

    # The likeliest token always stays: a p that is 0 in float32 is reached by no token at all.
    threshold = jnp.minimum(_largest_threshold(holds_p, logits.shape[0]), bits.max(-1))
    return jnp.where((bits >= threshold[:, None]) | (p >= 1.0)[:, None], logits, EXCLUDED)


def keep_min_p(logits: Array, p: Array) -> Array:
    """Logits of tokens less likely than p (f32[R]) times the likeliest at -inf; 0 keeps all. Nguyen et al. 2024."""
    floor = logits.max(-1, keepdims=True) + jnp.log(p)[:, None]
    return jnp.where((logits >= floor) | (p <= 0.0)[:, None], logits, EXCLUDED)


def draw(logits: Array, seeds: Array, positions: Array) -> Array:
    """i32[R] a token drawn from softmax(logits) by the Gumbel-max method (Gumbel 1954; Maddison et al. 2014).

    seeds: u32[R]; positions: i32[R]. The noise of (seed, position) is the same in any batch, row or bucket.
    """
    key = noise.draw_key(seeds[:, None], positions[:, None])
    return argmax(logits + noise.gumbel(key, jnp.arange(logits.shape[1], dtype=jnp.int32)))
