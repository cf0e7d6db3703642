"""Rotary position embedding as a function of arrays (Su et al. 2021): plain JAX."""

import jax.numpy as jnp
from jax import Array


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x [T, H, D] rotated by cos, sin f32[T, E/2], E <= D; computed in float32, returned in x's dtype.

    Dimension i is paired with dimension i + E/2 (the Hugging Face layout); dimensions from E on stay as they are.
    E = 0 rotates nothing.
    """
    half = cos.shape[-1]
    if half == 0:
        return x
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated
