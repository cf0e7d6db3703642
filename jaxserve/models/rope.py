"""The angles of rotary position embedding: a `RopeConfig` and positions go in, cos and sin come out.

Frequencies are NumPy constants of the compiled program; angles, cos and sin are float32 whatever the activations are.
Queries and keys are rotated by `pallas_kernels.kv_update.rope.rotate`, keys on their way into the pool.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_model_len: int) -> tuple[np.ndarray, float]:
    """(f32[head_dim / 2] radians a position, factor on cos and sin).

    `dynamic` depends on a length: the base grows as NTK-aware scaling prescribes for that many tokens. Hugging Face
    takes the longest sequence of the call, so a token's keys differ with what else is in the batch and with how a
    prompt is chunked. Here the length is fixed: max(max_model_len, original_max_position_embeddings). The two agree
    where max_model_len is within the original context, and on sequences exactly max_model_len long.
    """
    theta = rope.theta
    if rope.kind == "dynamic":
        original = rope.original_max_position_embeddings
        stretch = rope.factor * max(max_model_len, original) / original - (rope.factor - 1.0)
        theta *= stretch ** (head_dim / (head_dim - 2))
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.float32(1.0) / np.float32(theta) ** exponents
    if rope.kind == "linear":
        inverse = inverse / np.float32(rope.factor)
    elif rope.kind == "llama3":
        inverse = _blend(inverse, rope.factor, _llama3_kept(rope, inverse))
    elif rope.kind == "yarn":
        inverse = _blend(inverse, rope.factor, _yarn_kept(rope, head_dim))
    return inverse.astype(np.float32), rope.attention_factor


def rope_table(
    rope: RopeConfig, head_dim: int, positions: jax.Array, max_model_len: int
) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each f32[T, head_dim / 2], of positions i32[T]."""
    inverse, attention_factor = inverse_frequencies(rope, head_dim, max_model_len)
    angles = positions.astype(jnp.float32)[:, None] * inverse
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def _blend(inverse: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    """Each frequency between itself (kept 1) and itself / factor (kept 0)."""
    return inverse / np.float32(factor) * (1 - kept) + inverse * kept


def _llama3_kept(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Llama 3.1's ramp over rotations within the original context: 0 up to low_freq_factor, 1 from high_freq_factor."""
    rotations = rope.original_max_position_embeddings * inverse / np.float32(2 * math.pi)
    ramp = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return np.clip(ramp, 0.0, 1.0).astype(np.float32)


def _yarn_kept(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """YaRN's ramp over dimensions (Peng et al. 2023, section 3.2): 1 up to beta_fast rotations, 0 from beta_slow."""

    def dimension(rotations: float) -> float:
        wavelength = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a division by zero
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return 1 - np.clip(ramp, 0.0, 1.0)
