"""Plain-JAX rotation, and scatter of new K/V into the pool; in place when the pool is donated."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.kv_update.rope import rotate
from pallas_kernels.storage import KVPool, encode, quantise, quantised


def update_kv(
    kv: KVPool[Array], qkv: Array, cos: Array, sin: Array, kv_slots: Array, *, page_offset: int | Array
) -> tuple[Array, KVPool[Array]]:
    """Rotated queries and the pool; arguments as in api.py."""
    num_tokens, num_kv_heads, parts, head_dim = qkv.shape
    q = qkv[:, :, :-2].reshape(num_tokens, num_kv_heads * (parts - 2), head_dim)
    num_pages, page_size = kv.k.shape[:2]
    pages = jnp.where(kv_slots < 0, num_pages, kv_slots // page_size + page_offset)
    offsets = kv_slots % page_size

    def write(pool: Array, scales: Array, values: Array) -> tuple[Array, Array]:
        if quantised(pool):
            values, scale = quantise(values)
            scales = scales.at[pages, offsets].set(scale, mode="drop")
        return pool.at[pages, offsets].set(encode(values, pool.dtype), mode="drop"), scales

    new_k, k_scale = write(kv.k, kv.k_scale, rotate(qkv[:, :, -2], cos, sin))
    new_v, v_scale = write(kv.v, kv.v_scale, qkv[:, :, -1])
    return rotate(q, cos, sin), KVPool(k=new_k, v=new_v, k_scale=k_scale, v_scale=v_scale)
