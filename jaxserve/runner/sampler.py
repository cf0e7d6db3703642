"""Logits to tokens, on the device: what a step asks of the sampling kernel, token counts, log probabilities.

Rows are independent: what is drawn for one depends on its own logits, parameters, seed and position only, never on the
batch or the bucket.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxserve.batch import Logprobs, SamplingState, SlotState
from pallas_kernels.sampling import api
from pallas_kernels.sampling import reference as ops

PROMPT_CHUNK = 64  # prompt positions whose logits exist at once


def greedy(logits: Array) -> Array:
    """i32[R] the likeliest token of each row of f32[R, V]; -1 where the row holds a NaN."""
    return ops.greedy(logits)


def sample(
    logits: Array,
    sampling: SamplingState,
    slot_state: SlotState[Array],
    slots: Array,
    positions: Array,
    bitmask: Array,
    *,
    sample: Callable[..., Array] = api.sample,
) -> Array:
    """i32[R] a token for each row of f32[R, V]; -1 where the row holds a NaN or everything in it is forbidden.

    slots: i32[R] row -> slot, for token counts and biases. positions: i32[R] position of the token to draw.
    bitmask: u32[R, ceil(V/32)] bit v%32 of word v//32 allows token v. sample: the kernel, bound to its backend.
    """
    return sample(
        logits,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seeds=sampling.seeds,
        positions=positions,
        bitmask=bitmask,
        adjusts=sampling.adjusts,
        slots=slots,
        token_counts=slot_state.token_counts,
        logit_bias=slot_state.logit_bias,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
    )


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
