"""Plain-JAX adapters: one adapter after another over all tokens. The truth, and the path on CPU."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.grouped_matmul import reference as grouped
from pallas_kernels.grouped_matmul.plan import GroupPlan


def shrink(x: Array, a: Array, plan: GroupPlan) -> Array:
    """f32[T, R]; arguments as in api.py."""
    return grouped.grouped_matmul(x, a, plan, rows_per_token=1, out_dtype=jnp.float32)


def expand(shrunk: Array, b: Array, y: Array, plan: GroupPlan) -> Array:
    """[T, N] in y's dtype; arguments as in api.py."""
    delta = grouped.grouped_matmul(shrunk.astype(b.dtype), b, plan, rows_per_token=1, out_dtype=jnp.float32)
    return (y.astype(jnp.float32) + delta).astype(y.dtype)
