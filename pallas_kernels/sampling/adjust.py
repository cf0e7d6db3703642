"""What is done to one logit before it is sampled: elementwise, so that every backend does the same."""

import jax.numpy as jnp
import numpy as np
from jax import Array

PROMPT_FLAG = 1 << 24  # of token_counts: above any number of generated tokens
ALL_ALLOWED = np.uint32(0xFFFFFFFF)  # a word of the bitmask that forbids nothing


def forbid(logit: Array, word: Array, token: Array) -> Array:
    """-inf where bit token % 32 of word u32 is off."""
    allowed = (word >> (token & 31).astype(jnp.uint32)) & jnp.uint32(1)
    return jnp.where(allowed == 1, logit, -jnp.inf)


def adjust(logit: Array, count: Array, bias: Array, repetition: Array, presence: Array, frequency: Array) -> Array:
    """Adds the bias, then applies repetition (CTRL, Keskar et al. 2019), frequency and presence penalties (OpenAI).

    count: i32 times generated, plus PROMPT_FLAG if in the prompt, which concerns the repetition penalty only.
    """
    generated = count & (PROMPT_FLAG - 1)
    logit = logit + bias
    repeated = jnp.where(logit > 0, logit / repetition, logit * repetition)
    logit = jnp.where(count > 0, repeated, logit)
    logit = logit - frequency * generated.astype(jnp.float32)
    return logit - presence * (generated > 0).astype(jnp.float32)
