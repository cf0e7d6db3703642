"""Rows of any length over flat tokens, in Pallas-Triton: prefill is bound by the tensor cores.

A tile is `rows // G` consecutive query tokens of one row, times the G heads that share a KV head: 128 rows of a matrix,
which two warpgroups multiply by wgmma while every key and value is fetched once for all of them. Tiles walk their
context from the first block their first query can see to the block of their last query; only blocks that the diagonal
or the window's edge cuts are masked. Long walks are launched first.

    query tokens of row r   |- tile -|- tile -|- ti      keys   [visible to all][cut by the diagonal]
    heads of one KV head    |  G x   |  G x   |  G x            walked without   masked

Rows with a single token are left to the decode kernel, which splits their context. Padding tokens form tiles without
context, which write zeros.
"""

import functools
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.backend import Backend
from pallas_kernels.paged_attention.shape import AttentionShape
from pallas_kernels.paged_attention.triton_walk import (
    MASKED,
    Walk,
    block_size,
    make_walk,
    normalised,
    padded_dim,
    pool_operands,
    walk,
)
from pallas_kernels.storage import KVPool

MIXED = "paged_attention_mixed"  # op of tuned configurations
SHARED_BYTES = 227 * 1024  # that a program can have on Hopper
ROW, TOKEN, END, POSITION = range(4)  # columns of Tiles.tiles


@dataclass(frozen=True)
class MixedConfig:
    """How the mixed kernel is launched; all powers of two."""

    rows: int  # query tokens times heads of a tile; 64 a warpgroup
    block_tokens: int
    num_warps: int
    num_stages: int


@struct.dataclass
class Tiles:
    """The tiles of a mixed step; B is an upper bound that depends on sizes only."""

    page_table: Array  # i32[R, M]
    tiles: Array  # i32[B, 4] row (-1: no tile), first token, end of the row's tokens, position of the first token
    config: MixedConfig = struct.field(pytree_node=False)


def mixed_key(shape: AttentionShape, num_tokens: int) -> dict[str, int | str]:
    """What a tuned configuration is looked up by."""
    return asdict(shape) | {"tokens": pl.next_power_of_2(num_tokens)}


def mixed_heuristic(shape: AttentionShape, num_tokens: int) -> MixedConfig:
    """128 rows, unless the step's tokens do not fill them: rows of several tokens are mostly chunks of long prompts.

    A block of 128 tokens takes a fifth fewer instructions a token than one of 64, and the last registers: float8, which
    needs some for conversions, and few rows, which leave a warp more of each, take 64.
    """
    if shape.dtype == "float32":  # no tensor cores: registers are what runs out
        return MixedConfig(rows=max(32, pl.next_power_of_2(shape.group)), block_tokens=16, num_warps=4, num_stages=2)
    filled = pl.next_power_of_2(num_tokens * shape.group)
    rows = max(64, min(128, filled), pl.next_power_of_2(shape.group))
    if rows == 128 and shape.head_dim <= 128 and shape.kv_itemsize == 2:
        return MixedConfig(rows, block_tokens=128, num_warps=8, num_stages=2)
    block = block_size(shape.head_dim, shape.kv_itemsize)
    return MixedConfig(rows, block_tokens=block, num_warps=rows // 16, num_stages=3)


def mixed_candidates(shape: AttentionShape, num_tokens: int) -> tuple[MixedConfig, ...]:
    """What a tuner should try, the heuristic first."""
    padded = padded_dim(shape.head_dim)
    found = [mixed_heuristic(shape, num_tokens)] + [
        MixedConfig(rows, block, rows // 16, stages)
        for rows in (64, 128)
        for block in (32, 64, 128)
        for stages in (2, 3, 4)
        if rows >= shape.group
        and (stages * block * 2 * shape.kv_itemsize + rows * 2) * padded <= SHARED_BYTES
        and block * padded <= 128 * 128
    ]
    return tuple(dict.fromkeys(found))


def make_tiles(
    page_table: Array, query_start: Array, kv_lens: Array, num_tokens: int, *, group: int, config: MixedConfig
) -> Tiles:
    """Tiles of all rows with more than one token, and of the padding tokens behind the last row."""
    num_rows = kv_lens.shape[0]
    size = config.rows // group
    start = query_start.astype(jnp.int32)  # of the rows, and of the padding
    end = jnp.append(start[1:], num_tokens)
    counts = end - start
    padding = jnp.arange(num_rows + 1) == num_rows
    row_tiles = jnp.where((counts == 1) & ~padding, 0, -(-counts // size))
    tile_end = jnp.cumsum(row_tiles)
    # Each row's last tile may be part empty; such a row has two tokens at least.
    num_tiles = -(-num_tokens // size) + min(num_rows, num_tokens // 2) + 1
    tile = jnp.arange(num_tiles - 1, -1, -1, dtype=jnp.int32)  # a row's last tiles walk furthest
    row = (tile_end[None, :] <= tile[:, None]).sum(1, dtype=jnp.int32)
    exists, row = row <= num_rows, jnp.minimum(row, num_rows)
    token = start[row] + (tile - (tile_end - row_tiles)[row]) * size
    context = jnp.append(kv_lens, 0)[row]
    is_padding = row == num_rows
    columns = {
        ROW: jnp.where(exists, jnp.where(is_padding, 0, row), -1),
        TOKEN: token,
        END: end[row],
        POSITION: jnp.where(is_padding, -size, context - (end[row] - token)),
    }
    return Tiles(page_table=page_table, tiles=jnp.stack([columns[i] for i in range(4)], axis=1), config=config)


def attend_mixed(
    q: Array,
    kv: KVPool[Array],
    tiles: Tiles,
    *,
    page_offset: Array,
    scale: float,
    window: int,
    soft_cap: float,
    backend: Backend,
) -> Array:
    """[T, H, D] with the tiles' tokens filled in, the others undefined."""
    num_heads, config = q.shape[1], tiles.config
    static = make_walk(
        q, kv, block_tokens=config.block_tokens, scale=scale, soft_cap=soft_cap, interpret=backend.interpret
    )
    kernel = functools.partial(
        _kernel, static=static, group=num_heads // static.num_kv_heads, rows=config.rows, window=window
    )
    return compat.triton_call(
        kernel,
        name=MIXED,
        grid=(static.num_kv_heads, tiles.tiles.shape[0]),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=backend.interpret,
    )(q, tiles.page_table, tiles.tiles, page_offset.reshape(1), *pool_operands(kv))


def _kernel(
    q: Any,
    page_table: Any,
    tiles: Any,
    page_offset: Any,
    *refs: Any,
    static: Walk,
    group: int,
    rows: int,
    window: int,
) -> None:
    """refs: the pool's and the output."""
    *pool, out = refs
    kv_head, tile = pl.program_id(0), pl.program_id(1)
    num_tokens, block_tokens = rows // group, static.block_tokens

    def column(index: int) -> Array:
        return compat.load(tiles.at[tile, jnp.int32(index)])

    row = column(ROW)

    @pl.when(row >= 0)
    def _() -> None:
        first_token, first_position = column(TOKEN), column(POSITION)
        end_token = jnp.minimum(column(END), first_token + num_tokens)
        end = first_position + end_token - first_token  # of the positions that the tile's last query sees
        lane = jnp.arange(rows, dtype=jnp.int32)
        dims = jnp.arange(static.padded_dim, dtype=jnp.int32)
        token = first_token + lax.div(lane, group)
        head = kv_head * group + lax.rem(lane, group)
        position = first_position + lax.div(lane, group)
        # Where the group is no power of two, the lanes past the last token's heads already belong to the next tile.
        mask = (token < end_token)[:, None] & (dims[None, :] < static.head_dim)
        queries = compat.load(q.at[token[:, None], head[:, None], dims[None, :]], mask=mask, other=0.0)

        def mask_scores(start: Array, scores: Array) -> Array:
            key = (start + jnp.arange(block_tokens, dtype=jnp.int32))[None, :]
            visible = key <= position[:, None]
            if window:
                visible &= key > position[:, None] - window
            return jnp.where(visible, scores, MASKED)

        def hide(start: Array, scores: Array) -> Array:
            cut = start + block_tokens > first_position + 1
            if window:
                cut |= start <= end - 1 - window
            return lax.cond(cut, mask_scores, lambda _, whole: whole, start, scores)

        first_seen = jnp.maximum(first_position - window + 1, 0) if window else jnp.int32(0)
        sums, _, total = walk(
            static,
            pool,
            page_table,
            queries.astype(static.compute_dtype),
            row=row,
            kv_head=kv_head,
            page_offset=compat.load(page_offset.at[jnp.int32(0)]),
            # A tile of padding ends before position 0: it walks nothing.
            blocks=(lax.div(first_seen, block_tokens), lax.div(jnp.maximum(end, 0) + block_tokens - 1, block_tokens)),
            context=end,
            hide=hide,
        )
        values = normalised(sums, total).astype(out.dtype)
        compat.store(out.at[token[:, None], head[:, None], dims[None, :]], values, mask=mask)
