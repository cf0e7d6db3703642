"""Paged attention for NVIDIA Hopper by Pallas Mosaic GPU: arguments and results as in api.py.

A mixed step runs `mosaic_mixed.py`, with windows and soft caps. A decode step reads every key once whatever multiplies
them, so wgmma has nothing to win there: it runs the Triton kernel, which splits long contexts.

What is known of it: it compiles for sm_90a without spills, its tensor-core and TMA instructions are there, and its
paging, ring, masks and softmax equal the reference when interpreted (JAX 0.11 and later, a single case on 0.10), where
plain products stand in for wgmma and shared memory is watched for races. The products themselves, and that TMA reads
zeros past the last token, are taken on trust. It has never run on a GPU. `auto` does not choose it; ask for it by name.
CUDA 12.8 up to 12.9.0 miscompiles causal wgmma loops according to JAX's own attention kernel: use 12.9.1 or later.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from pallas_kernels import compat, tuning
from pallas_kernels.backend import Backend
from pallas_kernels.paged_attention import triton
from pallas_kernels.paged_attention.mosaic_mixed import (
    TILE_ALIGNMENT,
    WARPGROUP_ROWS,
    MixedConfig,
    Tiles,
    attend_tiles,
)
from pallas_kernels.paged_attention.shape import AttentionShape
from pallas_kernels.paged_attention.triton_mixed import mixed_key
from pallas_kernels.storage import KVPool, decode

MIXED = "paged_attention_mixed_mosaic"  # op of tuned configurations
HEAD_DIMS = (64, 128, 256)  # whole swizzled columns, up to the widest wgmma
PAGE_SIZES = (8, 16, 32, 64, 128)  # whole swizzled rows that fit a block
SHARED_BYTES = 227 * 1024  # of one thread block on Hopper
BARRIER_BYTES = 1024  # and alignment, generously


@struct.dataclass
class MixedPlan:
    """The tiles of a mixed step."""

    page_table: Array  # i32[R, M], M padded to whole blocks
    tiles: Tiles
    config: MixedConfig = struct.field(pytree_node=False)


def unsupported(shape: AttentionShape) -> str:
    """Why this backend cannot run attention of this shape; "" if it can."""
    try:
        compat.mosaic()
    except ImportError as error:
        return f"Mosaic GPU cannot be imported: {error}"
    if shape.dtype not in ("bfloat16", "float16"):
        return f"wgmma of {shape.dtype} is not float32-accurate; bfloat16 or float16 is needed"
    if shape.kv_dtype != shape.dtype:
        return f"keys and values are copied as they are: kept as {shape.kv_dtype}, computed in {shape.dtype}"
    if shape.head_dim not in HEAD_DIMS:
        return f"head_dim {shape.head_dim} is not one of {HEAD_DIMS}"
    if shape.page_size not in PAGE_SIZES:
        return f"page_size {shape.page_size} is not one of {PAGE_SIZES}"
    if not candidates(shape):
        return f"{shape.group} query heads of {shape.head_dim} a KV head do not fit in shared memory"
    return ""


def candidates(shape: AttentionShape) -> list[MixedConfig]:
    """The configurations of the mixed kernel worth timing, the heuristic's first."""
    configs = [
        MixedConfig(num_warpgroups, block_kv, num_stages)
        for num_warpgroups in (2, 1)
        for block_kv in (128, 64)
        for num_stages in (4, 2)
    ]
    return [config for config in configs if _fits(config, shape)]


def tile_tokens(config: MixedConfig, group: int) -> int:
    """Tokens of a tile: as many as have room for all heads of a group, in whole swizzled blocks of rows."""
    return config.num_warpgroups * WARPGROUP_ROWS // group // TILE_ALIGNMENT * TILE_ALIGNMENT


def prepare_attention(
    page_table: Array,
    query_start: Array,
    kv_lens: Array,
    positions: Array,
    token_row: Array,
    *,
    shape: AttentionShape,
    backend: Backend,
) -> Any:
    """The plan of a step: Triton's for a decode step, MixedPlan for any other."""
    num_rows, num_tokens = page_table.shape[0], positions.shape[0]
    if num_tokens == num_rows:
        return triton.prepare_attention(
            page_table, query_start, kv_lens, positions, token_row, shape=shape, backend=backend
        )
    config = tuning.choose(MIXED, backend.device, mixed_key(shape, num_tokens), candidates(shape)[0])
    size = tile_tokens(config, shape.group)
    # Padding tokens make one more row, without context: its outputs are zeros.
    row_end = jnp.append(query_start[1:], num_tokens).astype(jnp.int32)
    row_tiles = -(-(row_end - query_start) // size)
    tile_end = jnp.cumsum(row_tiles)
    num_tiles = min(num_tokens, num_tokens // size + num_rows + 1)
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(tile_end, tile, side="right", method="compare_all"), num_rows).astype(jnp.int32)
    token = query_start[row] + (tile - (tile_end - row_tiles)[row]) * size
    tokens = jnp.clip(row_end[row] - token, 0, size)
    token = jnp.minimum(token, num_tokens - 1)
    return MixedPlan(
        page_table=jnp.pad(
            page_table, ((0, 0), (0, -page_table.shape[1] % max(1, config.block_kv // shape.page_size)))
        ),
        tiles=Tiles(
            row=jnp.minimum(row, num_rows - 1),
            token=token,
            num_tokens=tokens,
            position=positions[token],
            context=jnp.where((tokens > 0) & (row < num_rows), kv_lens[jnp.minimum(row, num_rows - 1)], 0),
        ),
        config=config,
    )


def attend(
    q: Array,
    kv: KVPool[Array],
    plan: Any,
    *,
    page_offset: int | Array,
    scale: float,
    window: int,
    soft_cap: float,
    backend: Backend,
) -> Array:
    """Attention over the pool."""
    if not isinstance(plan, MixedPlan):
        return triton.attend(
            q, kv, plan, page_offset=page_offset, scale=scale, window=window, soft_cap=soft_cap, backend=backend
        )
    k, v = kv.k, kv.v
    if backend.interpret:
        # On CPU a pool holds bits, and a copy engine copies what it is given; only tests come here.
        k, v = decode(k, q.dtype), decode(v, q.dtype)
    return attend_tiles(
        q,
        k,
        v,
        plan.page_table,
        plan.tiles,
        lax.broadcast_in_dim(jnp.asarray(page_offset, jnp.int32), (1,), ()),
        tile_tokens=tile_tokens(plan.config, q.shape[1] // k.shape[2]),
        config=plan.config,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        interpret=backend.interpret,
    )


def _fits(config: MixedConfig, shape: AttentionShape) -> bool:
    queries_and_outputs = 2 * config.num_warpgroups * WARPGROUP_ROWS
    keys_and_values = 2 * config.num_stages * config.block_kv
    shared = (queries_and_outputs + keys_and_values) * shape.head_dim * 2 + BARRIER_BYTES
    # Accumulators, scores and weights live in registers; a warpgroup has 128 threads of them.
    wide = shape.head_dim > 128 and config.block_kv > 64
    return shared <= SHARED_BYTES and not wide and tile_tokens(config, shape.group) > 0
