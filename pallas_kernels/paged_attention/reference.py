"""Plain-JAX paged attention: the truth every other backend is tested against, and the path on CPU.

Queries are grouped into tiles of one row each (a tile holds one token in a decode step, `TILE` tokens otherwise). All
tiles walk the context together, one block of KV at a time, with an online softmax (Milakov & Gimelshein 2018). Blocks
sit at fixed positions and the walk ends at the longest context, so the cost follows the real lengths, no context length
is compiled in, and the order in which one token's context is summed never depends on its neighbours in the batch.
"""

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from pallas_kernels.paged_attention.shape import AttentionShape
from pallas_kernels.storage import KVPool, decode, quantised

TILE = 16  # query tokens a tile holds in a mixed step
BLOCK_TOKENS = 128  # context tokens the walk takes at a time
MASKED = -1e30  # finite, so that a fully masked tile stays free of NaN


@struct.dataclass
class AttentionPlan:
    """Which queries attend to which pages: made once per step, used by every layer. B tiles, X tokens a tile."""

    page_table: Array  # i32[R, M] pages of each row; M padded to whole blocks
    tile_row: Array  # i32[B] the row a tile belongs to
    tile_token: Array  # i32[B, X] index of the query token; clipped for padding
    tile_position: Array  # i32[B, X] position of the query token; -1 for padding
    tile_context: Array  # i32[B] tokens in cache of the tile's row
    token_tile: Array  # i32[T] tile of each token
    token_offset: Array  # i32[T] place within its tile
    num_blocks: Array  # i32[] blocks that cover the longest context


def prepare_attention(
    page_table: Array, query_start: Array, kv_lens: Array, positions: Array, token_row: Array, *, shape: AttentionShape
) -> AttentionPlan:
    """Groups the queries of a step into tiles; arguments as in api.py."""
    page_size = shape.page_size
    num_rows, num_tokens = page_table.shape[0], positions.shape[0]
    block_pages = max(1, BLOCK_TOKENS // page_size)
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % block_pages)))
    num_blocks = -(-jnp.max(kv_lens) // (block_pages * page_size))
    if num_tokens == num_rows:
        rows = jnp.arange(num_rows, dtype=jnp.int32)
        positions = jnp.where(kv_lens > 0, positions, -1)
        return AttentionPlan(
            page_table=page_table,
            tile_row=rows,
            tile_token=rows[:, None],
            tile_position=positions[:, None],
            tile_context=kv_lens,
            token_tile=rows,
            token_offset=jnp.zeros_like(rows),
            num_blocks=num_blocks,
        )
    row_tiles = -(-(query_start[1:] - query_start[:-1]) // TILE)
    tile_end = jnp.cumsum(row_tiles)
    num_tiles = -(-num_tokens // TILE) + num_rows  # no row wastes more than one tile
    tiles = jnp.arange(num_tiles, dtype=jnp.int32)
    tile_row = jnp.minimum(jnp.searchsorted(tile_end, tiles, side="right"), num_rows - 1).astype(jnp.int32)
    first_tile = tile_end - row_tiles
    token = query_start[tile_row][:, None] + (tiles - first_tile[tile_row])[:, None] * TILE + jnp.arange(TILE)
    valid = (token < query_start[tile_row + 1][:, None]) & (tiles < tile_end[-1])[:, None]
    token = jnp.clip(token, 0, num_tokens - 1)
    local = jnp.arange(num_tokens, dtype=jnp.int32) - query_start[token_row]
    return AttentionPlan(
        page_table=page_table,
        tile_row=tile_row,
        tile_token=token,
        tile_position=jnp.where(valid, positions[token], -1),
        tile_context=kv_lens[tile_row],
        token_tile=jnp.clip(first_tile[token_row] + local // TILE, 0, num_tiles - 1),
        token_offset=local % TILE,
        num_blocks=num_blocks,
    )


def attend(
    q: Array,
    kv: KVPool[Array],
    plan: AttentionPlan,
    *,
    page_offset: int | Array,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> Array:
    """Attention over the pool; arguments and result as in api.py."""
    num_heads, head_dim = q.shape[1:]
    page_size, num_kv_heads = kv.k.shape[1:3]
    num_tiles, tile = plan.tile_token.shape
    group = num_heads // num_kv_heads
    block_pages = max(1, BLOCK_TOKENS // page_size)
    block_tokens = block_pages * page_size
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT

    # [B, Hkv, X*G, D]: all queries of a tile that share a KV head are rows of one matrix.
    queries = q[plan.tile_token].reshape(num_tiles, tile, num_kv_heads, group, head_dim)
    queries = queries.transpose(0, 2, 1, 3, 4).reshape(num_tiles, num_kv_heads, tile * group, head_dim)
    query_position = jnp.repeat(plan.tile_position, group, axis=1)[:, None, :, None]
    tile_pages = plan.page_table[plan.tile_row]

    def block_values(pool: Array, scale: Array, block: Array) -> Array:
        pages = lax.dynamic_slice_in_dim(tile_pages, block * block_pages, block_pages, axis=1) + page_offset
        values = decode(pool.at[pages].get(mode="promise_in_bounds"), q.dtype)
        if quantised(pool):
            wide = values.astype(jnp.float32) * scale.at[pages].get(mode="promise_in_bounds")[..., None]
            values = wide.astype(q.dtype)
        return values.reshape(num_tiles, block_tokens, num_kv_heads, head_dim)

    def step(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, peak, total = carry
        keys = block_values(kv.k, kv.k_scale, block)
        scores = jnp.einsum("bhqd,bkhd->bhqk", queries, keys, precision=precision, preferred_element_type=jnp.float32)
        scores = scores * scale
        if soft_cap:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        key_position = block * block_tokens + jnp.arange(block_tokens, dtype=jnp.int32)
        visible = key_position <= query_position
        if window:
            visible &= key_position > query_position - window
        scores = jnp.where(visible, scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - new_peak), 0.0)
        rescale = jnp.exp(peak - new_peak)
        # Beyond a row's context lie other requests' leftovers; a NaN among them would survive a weight of zero.
        stale = key_position >= plan.tile_context[:, None]
        values = jnp.where(stale[:, :, None, None], 0, block_values(kv.v, kv.v_scale, block))
        out = out * rescale + jnp.einsum(
            "bhqk,bkhd->bhqd",
            weights.astype(q.dtype),
            values,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return out, new_peak, total * rescale + weights.sum(-1, keepdims=True)

    shape = (num_tiles, num_kv_heads, tile * group)
    init = (
        jnp.zeros((*shape, head_dim), jnp.float32),
        jnp.full((*shape, 1), MASKED, jnp.float32),
        jnp.zeros((*shape, 1), jnp.float32),
    )
    out, _, total = lax.fori_loop(0, plan.num_blocks, step, init)
    out = (out / jnp.maximum(total, 1e-30)).astype(q.dtype)
    out = out.reshape(num_tiles, num_kv_heads, tile, group, head_dim).transpose(0, 2, 1, 3, 4)
    return out[plan.token_tile, plan.token_offset].reshape(-1, num_heads, head_dim)
