"""Activations times a weight in 8 or 4 bits: what every backend takes and gives.

Weight-only schemes (int8, fp8, int4) widen the weight to the dtype of x: W8A16 and W4A16 (Frantar et al. 2022, "GPTQ";
Lin et al. 2023, "AWQ"). fp8_dynamic rounds x to float8 as well, with a scale for each token, so that both operands are
8 bits wide; plain JAX is its best backend, because XLA has cuBLASLt compute it.
"""

from typing import Any

from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.backend import Backend
from pallas_kernels.quant_matmul import reference, triton
from pallas_kernels.quant_matmul.weight import QuantWeight


def unsupported(backend: Backend, weight: QuantWeight[Any], dtype: DTypeLike) -> str:
    """Why `backend` cannot multiply x of `dtype` by a weight of this scheme and shape; "" if it can."""
    if backend.name == "reference":
        return ""
    return (
        triton.unsupported(weight, dtype) if backend.name == "triton" else f"there is no backend named {backend.name}"
    )


def quant_matmul(
    x: Array, weight: QuantWeight[Array], *, out_dtype: DTypeLike | None = None, backend: Backend | None = None
) -> Array:
    """x times the weight, [T, N] in `out_dtype` or x's dtype, accumulated in float32.

    x: f32, bf16 or f16 [T, K]; any T. weight: of logical shape [K, ...] with N outputs, see weight.py.
    backend: instead of the one that the weight carries.
    Products are exact for float32 (no TF32); for bf16 and f16 an int4 weight is rounded to x's dtype first.
    Raises ValueError where `unsupported` gives a reason.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    backend = weight.backend if backend is None else backend
    reason = unsupported(backend, weight, x.dtype)
    if reason:
        raise ValueError(f"{backend.name} cannot compute quant_matmul: {reason}")
    if backend.name == "reference":
        return reference.quant_matmul(x, weight, out_dtype=out_dtype)
    return triton.quant_matmul(x, weight, out_dtype=out_dtype, backend=backend)
