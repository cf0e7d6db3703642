"""Plain-JAX product with a quantised weight: the truth, the path on CPU, and the one that reaches float8 tensor cores.

XLA fuses the conversion of a weight with a scale per output into the product. A group-scaled weight it writes out in
full, once for every product.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.quant_matmul.weight import QuantWeight, dequantise
from pallas_kernels.storage import quantise as quantise_rows


def quant_matmul(x: Array, weight: QuantWeight[Array], *, out_dtype: DTypeLike) -> Array:
    """[T, N] in `out_dtype`; arguments as in api.py."""
    if weight.scheme == "int4":
        matrix = dequantise(weight, x.dtype).reshape(weight.num_inputs, weight.num_outputs)
        return _dot(x, matrix.T).astype(out_dtype)
    if weight.scheme == "fp8_dynamic":
        # Two float8 operands, scaled afterwards: what XLA hands to cuBLASLt as a float8 product.
        rows, scale = quantise_rows(x)
        return (_dot(rows, weight.values) * scale[:, None] * weight.scale).astype(out_dtype)
    return (_dot(x, weight.values.astype(x.dtype)) * weight.scale).astype(out_dtype)


def _dot(x: Array, values: Array) -> Array:
    """f32[T, N] of [T, K] and [N, K]. float32 asks for HIGHEST, because a GPU would otherwise round it to TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    axes = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, values, axes, precision=precision, preferred_element_type=jnp.float32)
