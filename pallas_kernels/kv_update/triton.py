"""Pallas-Triton rotation and scatter of a step's queries, keys and values, in one kernel.

Grid (blocks of tokens, KV heads, G + 2). A program takes one head of its tokens out of the fused projection, as it lies
there: a query head is rotated and written flat; a key is rotated, quantised if the pool is, and stored at rows of the
whole pool that the program looks up itself; a value likewise, unrotated.

    qkv [T, Hkv, G+2, D] ─┬─ 0..G-1  rotate ────────────► q    [t, head * G + i, :]
                          ├─ G       rotate ─ (scale) ──► pool [page(slot) + offset, slot % P, head, :]
                          └─ G+1              (scale) ──► pool
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import compat, tuning
from pallas_kernels.backend import Backend
from pallas_kernels.storage import KVPool, encode, quantise, quantised

OP = "kv_update"


@dataclass(frozen=True)
class Config:
    block_tokens: int
    num_warps: int


def key(num_tokens: int, num_kv_heads: int, head_dim: int, kv_dtype: str) -> dict[str, int | str]:
    """What a measured configuration is stored under."""
    return {
        "tokens": pl.next_power_of_2(num_tokens),
        "kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "kv_dtype": kv_dtype,
    }


def heuristic(num_tokens: int) -> Config:
    """Few tokens are latency-bound: one a program. Many fill four warps."""
    return Config(block_tokens=1, num_warps=1) if num_tokens <= 256 else Config(block_tokens=16, num_warps=4)


def candidates() -> list[Config]:
    """What a tuner should try."""
    return [Config(block_tokens=tokens, num_warps=warps) for tokens in (1, 4, 16) for warps in (1, 2, 4)]


def update_kv(
    kv: KVPool[Array],
    qkv: Array,
    cos: Array,
    sin: Array,
    kv_slots: Array,
    *,
    page_offset: int | Array,
    backend: Backend,
) -> tuple[Array, KVPool[Array]]:
    """Rotated queries and the pool; arguments as in api.py."""
    num_tokens, num_kv_heads, parts, head_dim = qkv.shape
    group = parts - 2
    config = tuning.choose(
        OP, backend.device, key(num_tokens, num_kv_heads, head_dim, kv.k.dtype.name), heuristic(num_tokens)
    )
    # Operands of size zero do not exist for a kernel.
    rotation = [cos, sin] if cos.shape[-1] else []
    pools = [kv.k, kv.v, kv.k_scale, kv.v_scale] if quantised(kv.k) else [kv.k, kv.v]
    inputs = [qkv, kv_slots, jnp.asarray(page_offset, jnp.int32).reshape(1), *rotation]
    q, *written = compat.triton_call(
        functools.partial(_kernel, num_pools=len(pools), block=config.block_tokens),
        name="kv_update",
        grid=(pl.cdiv(num_tokens, config.block_tokens), num_kv_heads, parts),
        out_shape=[
            jax.ShapeDtypeStruct((num_tokens, num_kv_heads * group, head_dim), qkv.dtype),
            *(jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools),
        ],
        aliases={len(inputs) + i: 1 + i for i in range(len(pools))},
        num_warps=config.num_warps,
        num_stages=1,
        interpret=backend.interpret,
    )(*inputs, *pools)
    scales = written[2:] or [kv.k_scale, kv.v_scale]
    return q, KVPool(k=written[0], v=written[1], k_scale=scales[0], v_scale=scales[1])


def _kernel(*refs: Any, num_pools: int, block: int) -> None:
    """refs: qkv, slots, offset, (cos, sin,) the pools as they come in, q, the pools as they go out."""
    qkv, slots, offset, *rotation = refs[: -2 * num_pools - 1]
    q_out, k_pool, v_pool, *scales = refs[-num_pools - 1 :]
    k_scale, v_scale = scales or (None, None)
    num_tokens, _, parts, head_dim = qkv.shape
    group, page_size = parts - 2, k_pool.shape[1]
    head, part = pl.program_id(1), pl.program_id(2)
    token = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
    dim = jnp.arange(pl.next_power_of_2(head_dim), dtype=jnp.int32)
    real = token < num_tokens
    inside = real[:, None] & (dim < head_dim)[None, :]

    def read(dims: Array) -> Array:
        return compat.load(qkv.at[token[:, None], head, part, dims[None, :]], mask=inside, other=0)

    def rotated() -> Array:
        if not rotation:
            return read(dim)
        half = rotation[0].shape[1]
        partner = jnp.where(dim < half, dim + half, jnp.where(dim < 2 * half, dim - half, dim))
        return _rotate(read(dim), read(partner), *rotation, token=token, dim=dim, real=real)

    def store(pool: Any, scale: Any, values: Array) -> None:
        slot = compat.load(slots.at[token], mask=real, other=-1)
        page, place, written = slot // page_size + offset[0], slot % page_size, slot >= 0
        if scale is not None:
            values, factor = quantise(values)
            compat.store(scale.at[page, place, head], factor, mask=written)
        where = page[:, None], place[:, None], head, dim[None, :]
        compat.store(pool.at[where], encode(values, pool.dtype), mask=inside & written[:, None])

    @pl.when(part < group)
    def write_query() -> None:
        compat.store(q_out.at[token[:, None], head * group + part, dim[None, :]], rotated(), mask=inside)

    @pl.when(part == group)
    def write_key() -> None:
        store(k_pool, k_scale, rotated())

    @pl.when(part == group + 1)
    def write_value() -> None:
        store(v_pool, v_scale, read(dim))


def _rotate(x: Array, partners: Array, cos_ref: Any, sin_ref: Any, *, token: Array, dim: Array, real: Array) -> Array:
    """x [block, D] rotated; dimensions without an angle turn by cos 1 and sin 0."""
    half = cos_ref.shape[1]
    angle = jnp.where(dim < half, dim, dim - half)
    turned = real[:, None] & (dim < 2 * half)[None, :]
    cos = compat.load(cos_ref.at[token[:, None], angle[None, :]], mask=turned, other=1.0)
    sin = compat.load(sin_ref.at[token[:, None], angle[None, :]], mask=turned, other=0.0)
    sign = jnp.where(dim < half, -1.0, 1.0)[None, :]
    return (x.astype(jnp.float32) * cos + sign * partners.astype(jnp.float32) * sin).astype(x.dtype)
