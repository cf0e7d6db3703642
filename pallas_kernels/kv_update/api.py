"""A step's queries, keys and values: rotated, and keys and values put into their pages, in place."""

from jax import Array

from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.kv_update import reference, triton
from pallas_kernels.storage import KVPool


def update_kv(
    kv: KVPool[Array],
    qkv: Array,
    cos: Array,
    sin: Array,
    kv_slots: Array,
    *,
    page_offset: int | Array,
    backend: Backend = REFERENCE,
) -> tuple[Array, KVPool[Array]]:
    """(q [T, H, D] rotated, the pool with token t's key and value written at its slot).

    kv: the whole pool [L*N, P, Hkv, D]; page_offset = layer * N is where this layer's pages start.
    qkv: [T, Hkv, G+2, D], for each KV head its G query heads, its key and its value, as the fused projection gives
        them; query head h * G + i of the result is qkv[:, h, i].
    cos, sin: f32[T, E/2] rotate queries and keys, E <= D; dimensions i and i + E/2 are a pair; E = 0: no rotation.
    kv_slots: i32[T] page * P + offset within a layer; -1 writes nothing. Tokens of padding may also point into page 0,
        the waste page; all other slots are distinct and in bounds.
    """
    if backend.name == "reference":
        return reference.update_kv(kv, qkv, cos, sin, kv_slots, page_offset=page_offset)
    assert backend.name == "triton", backend
    return triton.update_kv(kv, qkv, cos, sin, kv_slots, page_offset=page_offset, backend=backend)
