"""Rows of activations times the weight of their group: what every backend takes and gives.

    plan = plan_groups(experts.reshape(-1), num_experts, block_size(...))   once for all products of a layer
    out  = grouped_matmul(x, weights, plan, rows_per_token=top_k)           row t * top_k + j: token t, j-th expert

Sorted rows take `plan_sorted(group_sizes, ...)`. `lax.ragged_dot` would do the same in name, but on a GPU it multiplies
every row by every weight and masks.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.grouped_matmul import reference, triton
from pallas_kernels.grouped_matmul.plan import GroupPlan, plan_groups, plan_sorted

__all__ = ["GroupPlan", "block_size", "grouped_matmul", "plan_groups", "plan_sorted", "unsupported"]


def unsupported(backend: Backend, weights: Any, dtype: DTypeLike) -> str:
    """Why `backend` cannot multiply rows of `dtype` by weights of this shape and dtype; "" if it can."""
    if backend.name == "reference":
        return ""
    return triton.unsupported(weights, dtype) if backend.name == "triton" else f"there is no backend {backend.name}"


def block_size(num_rows: int, num_groups: int) -> int:
    """Rows a block of a plan should hold: what an average group fills, within what a tile can."""
    return triton.block_size(num_rows, num_groups)


def grouped_matmul(
    x: Array,
    weights: Array,
    plan: GroupPlan,
    *,
    rows_per_token: int = 1,
    out_dtype: DTypeLike | None = None,
    backend: Backend = REFERENCE,
) -> Array:
    """[M, N] in `out_dtype` or x's dtype: row r is x[r // rows_per_token] @ weights[group of r], zeros without a group.

    x: [M / rows_per_token, K] f32, bf16 or f16; a token's rows read it from here, it is never repeated.
    weights: [G, K, N] in x's dtype. Accumulation in float32; float32 products are exact (no TF32).
    plan: of the M rows and G groups. Groups may be empty, of one row, or hold all rows.
    Raises ValueError where `unsupported` gives a reason.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    reason = unsupported(backend, weights, x.dtype)
    if reason:
        raise ValueError(f"{backend.name} cannot compute grouped_matmul: {reason}")
    if plan.group_of_row.shape[0] == 0:
        return jnp.zeros((0, weights.shape[2]), out_dtype)
    if backend.name == "reference":
        return reference.grouped_matmul(x, weights, plan, rows_per_token=rows_per_token, out_dtype=out_dtype)
    return triton.grouped_matmul(x, weights, plan, rows_per_token=rows_per_token, out_dtype=out_dtype, backend=backend)
