"""Plain-JAX grouped product: all rows times one weight after another. The truth, and the path on CPU."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul.plan import GroupPlan


def grouped_matmul(x: Array, weights: Array, plan: GroupPlan, *, rows_per_token: int, out_dtype: DTypeLike) -> Array:
    """[M, N] in `out_dtype`; arguments as in api.py."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT

    def add(group: Array, total: Array) -> Array:
        product = jnp.dot(x, weights[group], precision=precision, preferred_element_type=jnp.float32)
        mine = (plan.group_of_row == group)[:, None]
        return jnp.where(mine, jnp.repeat(product, rows_per_token, axis=0), total)

    init = jnp.zeros((plan.group_of_row.shape[0], weights.shape[2]), jnp.float32)
    return lax.fori_loop(0, weights.shape[0], add, init).astype(out_dtype)
