"""The paged KV pool: one pytree, and how values are laid down in it.

On CPU, floats of 16 and 8 bits are stored as their bits in uint16 and uint8: XLA there widens a whole narrow float
array to float32 for a scatter into it, so one token's write would cost a copy of the pool. Written as integers, a pool
is updated in place on every platform; bits of 16 mean the dtype of the queries, bits of 8 mean float8_e4m3fn.
A pool of float8 carries a float32 scale for every token and KV head: value = stored * scale.
"""

from typing import Generic, TypeVar

import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.typing import DTypeLike

Leaf = TypeVar("Leaf")  # Array; jax.ShapeDtypeStruct where programs are compiled without data

FLOAT8 = jnp.float8_e4m3fn
FLOAT8_MAX = 448.0


@struct.dataclass
class KVPool(Generic[Leaf]):
    """Keys and values of all layers, donated to every step. Layer l's pages start at l * N."""

    k: Leaf  # [L*N, P, Hkv, D]
    v: Leaf  # [L*N, P, Hkv, D]
    k_scale: Leaf  # f32[L*N, P, Hkv]; [L*N, P, 0] unless the pool is float8
    v_scale: Leaf


def storage_dtype(dtype: DTypeLike, platform: str) -> jnp.dtype:
    """The pool's dtype on `platform` for values kept as `dtype`."""
    dtype = jnp.dtype(dtype)
    if platform != "cpu" or dtype.itemsize == 4:
        return dtype
    return jnp.dtype(jnp.uint16 if dtype.itemsize == 2 else jnp.uint8)


def quantised(stored: Array) -> bool:
    """Whether a pool's values need their scales."""
    return stored.dtype in (jnp.uint8, FLOAT8)


def quantise(values: Array) -> tuple[Array, Array]:
    """float8_e4m3fn[..., D] and its f32[...] scale, so that the largest of D values is the largest float8."""
    wide = values.astype(jnp.float32)
    peak = jnp.max(jnp.abs(wide), axis=-1)
    scale = jnp.where(peak > 0, peak / FLOAT8_MAX, 1.0)
    return (wide / scale[..., None]).astype(FLOAT8), scale


def encode(values: Array, dtype: DTypeLike) -> Array:
    """Values as they are stored in a pool of `dtype`."""
    if dtype in (jnp.uint16, jnp.uint8):
        return lax.bitcast_convert_type(values, dtype)
    return values.astype(dtype)


def decode(stored: Array, dtype: DTypeLike) -> Array:
    """Stored values as `dtype`, the dtype they were computed in; float8 still wants its scale."""
    if stored.dtype == jnp.uint16:
        return lax.bitcast_convert_type(stored, dtype)
    if stored.dtype == jnp.uint8:
        return lax.bitcast_convert_type(stored, FLOAT8).astype(dtype)
    return stored.astype(dtype)
