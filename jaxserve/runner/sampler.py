"""Logits to tokens, on the device: bans and biases, penalties, temperature, filters, draw, log probabilities.

Rows are independent: what is drawn for one depends on its own logits, parameters, seed and position only, never on the
batch or the bucket. Work that no row of a step asked for is skipped by `lax.cond`, one predicate per paragraph.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.batch import PROMPT_FLAG, Logprobs, SamplingState, SlotState
from jaxserve.request import GREEDY_TEMPERATURE
from pallas_kernels.sampling import reference as ops

PROMPT_CHUNK = 64  # prompt positions whose logits exist at once


def greedy(logits: Array) -> Array:
    """i32[R] the likeliest token of each row of f32[R, V]; -1 where the row holds a NaN."""
    tokens = ops.argmax(logits)
    best = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    # A maximum spreads a NaN and argmax then points at it, so looking at the winner finds any NaN.
    return jnp.where(jnp.isnan(best), -1, tokens)


def sample(
    logits: Array, sampling: SamplingState, slot_state: SlotState[Array], slots: Array, positions: Array, bitmask: Array
) -> Array:
    """i32[R] a token for each row of f32[R, V]; -1 where the row holds a NaN.

    slots: i32[R] row -> slot, for token counts and biases. positions: i32[R] position of the token to draw.
    bitmask: u32[R, ceil(V/32)] bit v%32 of word v//32 allows token v.
    """
    forbids = jnp.any(bitmask != jnp.uint32(0xFFFFFFFF))
    adjusts = jnp.any(sampling.adjusts == 1)
    draws = jnp.any(sampling.temperature >= GREEDY_TEMPERATURE)

    def sample_any(x: Array) -> Array:
        bad = jnp.isnan(x.max(-1))
        with jax.named_scope("forbid"):
            x = lax.cond(forbids, lambda x: _forbid(x, bitmask), lambda x: x, x)
        with jax.named_scope("bias_and_penalties"):
            x = lax.cond(adjusts, lambda x: _adjust(x, sampling, slot_state, slots), lambda x: x, x)
        with jax.named_scope("draw"):
            tokens = lax.cond(draws, lambda x: _draw(x, sampling, positions), ops.argmax, x)
        # A row in which everything is forbidden has no token to give, least of all a forbidden one.
        return jnp.where(bad | (x.max(-1) == -jnp.inf), -1, tokens)

    return lax.cond(forbids | adjusts | draws, sample_any, greedy, logits)


def _forbid(logits: Array, bitmask: Array) -> Array:
    token = jnp.arange(logits.shape[1], dtype=jnp.int32)
    allowed = (bitmask[:, token // 32] >> (token % 32).astype(jnp.uint32)) & 1
    return jnp.where(allowed == 1, logits, -jnp.inf)


def _adjust(logits: Array, sampling: SamplingState, slot_state: SlotState[Array], slots: Array) -> Array:
    """logit_bias and allowed tokens, then repetition (CTRL), presence and frequency (OpenAI) penalties."""
    counts = slot_state.token_counts.at[slots].get(mode="fill", fill_value=0)
    bias = slot_state.logit_bias.at[slots].get(mode="fill", fill_value=0.0)
    generated = counts % PROMPT_FLAG
    adjusted = logits + bias
    repetition = sampling.repetition_penalty[:, None]
    repeated = jnp.where(adjusted > 0, adjusted / repetition, adjusted * repetition)
    adjusted = jnp.where(counts > 0, repeated, adjusted)
    adjusted = adjusted - sampling.frequency_penalty[:, None] * generated
    adjusted = adjusted - sampling.presence_penalty[:, None] * (generated > 0)
    return jnp.where(sampling.adjusts[:, None] == 1, adjusted, logits)


def _draw(logits: Array, sampling: SamplingState, positions: Array) -> Array:
    drawn_rows = sampling.temperature >= GREEDY_TEMPERATURE
    scaled = logits / jnp.where(drawn_rows, sampling.temperature, 1.0)[:, None]
    # A greedy row needs no filter; off, it cannot make the whole batch pay for one.
    k = jnp.where(drawn_rows, sampling.top_k, 0)
    p = jnp.where(drawn_rows, sampling.top_p, 1.0)
    scaled = lax.cond(jnp.any(k > 0), lambda x: ops.keep_top_k(x, k), lambda x: x, scaled)
    scaled = lax.cond(jnp.any(p < 1.0), lambda x: ops.keep_top_p(x, p), lambda x: x, scaled)
    scaled = lax.cond(jnp.any(sampling.min_p > 0.0), lambda x: ops.keep_min_p(x, sampling.min_p), lambda x: x, scaled)
    drawn = ops.draw(scaled, sampling.seeds, positions)
    return jnp.where(drawn_rows, drawn, ops.argmax(logits))


def count_tokens(slot_state: SlotState[Array], slots: Array, tokens: Array, adjusts: Array) -> Array:
    """token_counts with the sampled tokens of rows that keep counts added; i32[S, V], updated in place."""
    num_slots = slot_state.token_counts.shape[0]
    counted = jnp.where((adjusts == 1) & (tokens >= 0), slots, num_slots)
    return slot_state.token_counts.at[counted, tokens].add(1, mode="drop")


def token_logprobs(logits: Array, tokens: Array, top: int) -> Logprobs:
    """Log probabilities of `tokens` i32[R] and of the `top` likeliest under raw logits f32[R, V]."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=1)[:, 0]
    if top:
        values, ids = ops.top_k(logits, top)
    else:
        values, ids = jnp.zeros((logits.shape[0], 0)), jnp.zeros((logits.shape[0], 0), jnp.int32)
    return Logprobs(
        chosen=chosen - log_total, rank=ops.rank(logits, chosen), top_ids=ids, top=values - log_total[:, None]
    )


def no_logprobs(rows: int, top: int) -> Logprobs:
    return Logprobs(
        chosen=jnp.zeros((rows,)),
        rank=jnp.zeros((rows,), jnp.int32),
        top_ids=jnp.zeros((rows, top), jnp.int32),
        top=jnp.zeros((rows, top)),
    )


def prompt_logprobs(hidden: Array, targets: Array, logits_of: Callable[[Array], Array], top: int) -> Logprobs:
    """Log probabilities of `targets` i32[T] given hidden [T, E], a chunk of positions at a time.

    Never holds more than PROMPT_CHUNK rows of logits; a chunk in which nothing is wanted (all targets -1) is skipped.
    logits_of: [n, E] -> f32[n, V].
    """
    num_tokens = targets.shape[0]
    padding = -num_tokens % PROMPT_CHUNK
    chunks = (num_tokens + padding) // PROMPT_CHUNK
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, PROMPT_CHUNK, -1)
    targets = jnp.pad(targets, (0, padding), constant_values=-1).reshape(chunks, PROMPT_CHUNK)

    def one_chunk(chunk: tuple[Array, Array]) -> Logprobs:
        return lax.cond(
            jnp.any(chunk[1] >= 0),
            lambda c: token_logprobs(logits_of(c[0]), c[1], top),
            lambda c: no_logprobs(PROMPT_CHUNK, top),
            chunk,
        )

    out = lax.map(one_chunk, (hidden, targets))
    return jax.tree.map(lambda x: x.reshape(chunks * PROMPT_CHUNK, *x.shape[2:])[:num_tokens], out)
