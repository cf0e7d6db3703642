"""How K/V values are laid down in a pool: 16-bit floats are stored as their bits in uint16.

XLA on CPU widens a whole 16-bit float array to float32 for a scatter into it, so one token's write would cost a copy of
the pool. A uint16 pool is written in place on every platform; the bits mean the dtype of the queries.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


def storage_dtype(compute_dtype: DTypeLike, platform: str) -> jnp.dtype:
    """The pool's dtype on `platform` for a model that computes in `compute_dtype`."""
    dtype = jnp.dtype(compute_dtype)
    return jnp.dtype(jnp.uint16) if platform == "cpu" and dtype.itemsize == 2 else dtype


def encode(values: Array, dtype: DTypeLike) -> Array:
    """Values as they are stored in a pool of `dtype`."""
    if dtype == jnp.uint16:
        return lax.bitcast_convert_type(values, jnp.uint16)
    return values.astype(dtype)


def decode(stored: Array, dtype: DTypeLike) -> Array:
    """Stored values as `dtype`, the dtype they were computed in."""
    if stored.dtype == jnp.uint16:
        return lax.bitcast_convert_type(stored, dtype)
    return stored.astype(dtype)
