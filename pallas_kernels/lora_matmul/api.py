"""Low-rank adapters in one batch (Hu et al. 2021; Chen et al. 2023, "Punica"; Sheng et al. 2023, "S-LoRA").

    plan = plan_adapters(adapter_of_token, num_adapters)        once a step, for all layers
    y    = expand(shrink(x, a, plan), b, y, plan)               y += x @ a[adapter] @ b[adapter]

Adapters of a lower rank are padded with zeros to R; an adapter's factor alpha / rank belongs into its b.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.grouped_matmul.api import block_size
from pallas_kernels.grouped_matmul.plan import GroupPlan, plan_groups
from pallas_kernels.lora_matmul import reference, triton

__all__ = ["expand", "plan_adapters", "shrink", "unsupported"]


def unsupported(backend: Backend, rank: int, weight_dtype: DTypeLike, dtype: DTypeLike) -> str:
    """Why `backend` cannot apply adapters of `rank` and `weight_dtype` to activations of `dtype`; "" if it can."""
    if backend.name == "reference":
        return ""
    if backend.name == "triton":
        return triton.unsupported(rank, weight_dtype, dtype)
    return f"there is no backend named {backend.name}"


def plan_adapters(adapter_of_token: Array, num_adapters: int) -> GroupPlan:
    """The plan of a step. adapter_of_token: i32[T], -1 for none; equal ones need not lie side by side."""
    return plan_groups(adapter_of_token, num_adapters, block_size(adapter_of_token.shape[0], num_adapters))


def shrink(x: Array, a: Array, plan: GroupPlan, *, backend: Backend = REFERENCE) -> Array:
    """f32[T, R]: token t is x[t] @ a[its adapter], zeros without one.

    x: [T, K] f32, bf16 or f16. a: [num_adapters, K, R] in x's dtype.
    Raises ValueError where `unsupported` gives a reason.
    """
    _check(backend, a.shape[2], a.dtype, x.dtype)
    if x.shape[0] == 0:
        return jnp.zeros((0, a.shape[2]), jnp.float32)
    if backend.name == "reference":
        return reference.shrink(x, a, plan)
    return triton.shrink(x, a, plan, backend=backend)


def expand(shrunk: Array, b: Array, y: Array, plan: GroupPlan, *, backend: Backend = REFERENCE) -> Array:
    """y [T, N] with shrunk[t] @ b[its adapter] added to token t, in y's dtype; y itself where a token has none.

    shrunk: f32[T, R], rounded to b's dtype for the product. b: [num_adapters, R, N] in y's dtype. y is changed in place
    where it is not needed any more. Raises ValueError where `unsupported` gives a reason.
    """
    _check(backend, b.shape[1], b.dtype, y.dtype)
    if y.shape[0] == 0:
        return y
    if backend.name == "reference":
        return reference.expand(shrunk, b, y, plan)
    return triton.expand(shrunk, b, y, plan, backend=backend)


def _check(backend: Backend, rank: int, weight_dtype: Any, dtype: Any) -> None:
    reason = unsupported(backend, rank, weight_dtype, dtype)
    if reason:
        raise ValueError(f"{backend.name} cannot compute lora_matmul: {reason}")
