"""Plain-JAX scatter of new K/V into the pool; in place when the pool is donated."""

from jax import Array

from pallas_kernels.storage import encode


def update_kv(
    k_pool: Array, v_pool: Array, k: Array, v: Array, kv_slots: Array, *, page_offset: int | Array
) -> tuple[Array, Array]:
    """Returns both pools with token t's key and value written at its slot.

    k_pool, v_pool: [L*N, P, Hkv, D], the pages of all layers; page_offset = layer * N is where this layer's start.
    k, v: [T, Hkv, D].
    kv_slots: i32[T] page * P + offset within a layer. Padding tokens point into page 0, the waste page; slots of real
        tokens are distinct, and must be in bounds.
    """
    page_size = k_pool.shape[1]
    pages = kv_slots // page_size + page_offset
    offsets = kv_slots % page_size

    def write(pool: Array, values: Array) -> Array:
        return pool.at[pages, offsets].set(encode(values, pool.dtype), mode="promise_in_bounds")

    return write(k_pool, k), write(v_pool, v)
