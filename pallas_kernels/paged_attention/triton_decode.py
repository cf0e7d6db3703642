"""One query token a row, in Pallas-Triton: bound by the bandwidth that reads keys and values.

A program takes one KV head of one row, and one of `num_splits` equal parts of the blocks the row can see (Dao et al.
2023, "Flash-Decoding"), so that few rows still fill the device. The query heads of the KV head are the rows of the
matrix products, padded to 16. How a row is split follows from its own length: its result never depends on its
neighbours, and parts beyond a short context return at once. With one split the result is written directly; otherwise a
second small kernel weighs the parts.

    grid (Hkv, splits, R)                      KV heads of one token lie side by side in memory, so they run together
    row r   |--------|--------|--------|--     visible blocks of 64 tokens; split s takes those from lo + s * per
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
    MIN_DOT,
    Walk,
    block_size,
    make_walk,
    normalised,
    padded_dim,
    pool_operands,
    walk,
)
from pallas_kernels.storage import KVPool

DECODE = "paged_attention_decode"  # op of tuned configurations
MAX_SPLITS = 128
PROGRAMS_PER_CORE = 4  # fewer leave cores waiting for the longest row
SPLITS_AT_A_TIME = 8  # that a combining program holds in registers


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel is launched; all powers of two."""

    num_splits: int
    block_tokens: int
    num_warps: int = 4
    num_stages: int = 3  # blocks of keys and values in shared memory, all but one of them on their way


@struct.dataclass
class DecodePlan:
    """Which rows have one query token, and where."""

    page_table: Array  # i32[R, M]
    kv_lens: Array  # i32[R]
    row_token: Array  # i32[R] the row's query token; -1: the row has none or several, and nothing is written for it
    config: DecodeConfig = struct.field(pytree_node=False)


def decode_key(shape: AttentionShape, num_rows: int) -> dict[str, int | str]:
    """What a tuned configuration is looked up by; the context a server allows says little of the contexts it meets."""
    return asdict(shape) | {"rows": pl.next_power_of_2(num_rows)}


def decode_heuristic(shape: AttentionShape, num_rows: int, max_tokens: int, num_cores: int) -> DecodeConfig:
    """Enough programs for every core, but no more splits than blocks."""
    block = block_size(shape.head_dim, shape.kv_itemsize)
    wanted = pl.cdiv(PROGRAMS_PER_CORE * num_cores, num_rows * shape.num_kv_heads)
    splits = min(pl.next_power_of_2(wanted), pl.next_power_of_2(pl.cdiv(max_tokens, block)), MAX_SPLITS)
    return DecodeConfig(num_splits=splits, block_tokens=block)


def decode_candidates(
    shape: AttentionShape, num_rows: int, max_tokens: int, num_cores: int
) -> tuple[DecodeConfig, ...]:
    """What a tuner should try, the heuristic first."""
    first = decode_heuristic(shape, num_rows, max_tokens, num_cores)
    splits = [first.num_splits * times // 2 for times in (2, 1, 4, 8)]
    blocks = [(64, 2), (64, 3), (32, 3), (32, 4), (32, 6), (128, 2)]
    padded = padded_dim(shape.head_dim)
    found = [first] + [
        DecodeConfig(split, block, warps, stages)
        for split in splits
        for block, stages in blocks
        for warps in (2, 4)
        if 1 <= split <= MAX_SPLITS
        and stages * block * 2 * padded * shape.kv_itemsize <= 200 * 1024
        and block * padded <= 8192 * warps // 2
    ]
    return tuple(dict.fromkeys(found))


def attend_decode(
    q: Array,
    kv: KVPool[Array],
    plan: DecodePlan,
    *,
    page_offset: Array,
    scale: float,
    window: int,
    soft_cap: float,
    backend: Backend,
    into: tuple[Array, ...] = (),
) -> Array:
    """[T, H, D] with the plan's tokens filled in; into: () or the one array they are written into."""
    num_tokens, num_heads, head_dim = q.shape
    num_rows, config = plan.page_table.shape[0], plan.config
    static = make_walk(
        q, kv, block_tokens=config.block_tokens, scale=scale, soft_cap=soft_cap, interpret=backend.interpret
    )
    split = config.num_splits > 1
    result = jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), q.dtype)
    partials = (
        jax.ShapeDtypeStruct((num_rows, num_heads, config.num_splits, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((num_rows, num_heads, config.num_splits), jnp.float32),
    )
    operands = [q, plan.page_table, plan.kv_lens, plan.row_token, page_offset.reshape(1), *pool_operands(kv)]
    kernel = functools.partial(
        _decode_kernel,
        static=static,
        group=num_heads // static.num_kv_heads,
        window=window,
        num_splits=config.num_splits,
    )
    launched = compat.triton_call(
        kernel,
        name=DECODE,
        grid=(static.num_kv_heads, config.num_splits, num_rows),
        out_shape=partials if split else (result,),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=backend.interpret,
        aliases={len(operands): 0} if into and not split else {},
    )
    outputs = launched(*operands, *(() if split else into))
    if not split:
        (out,) = outputs
        return out
    combine = functools.partial(
        _combine_kernel,
        padded_dim=static.padded_dim,
        block_tokens=config.block_tokens,
        window=window,
        num_splits=config.num_splits,
    )
    (out,) = compat.triton_call(
        combine,
        name=f"{DECODE}_combine",
        grid=(num_heads, num_rows),
        out_shape=(result,),
        num_warps=2,
        num_stages=2,
        interpret=backend.interpret,
        aliases={4: 0} if into else {},
    )(*outputs, plan.kv_lens, plan.row_token, *into)
    return out


def _visible_blocks(context: Array, window: int, block_tokens: int, num_splits: int) -> tuple[Array, Array, Array]:
    """(first block a row's last token can see, end, blocks a split takes)."""
    first = lax.div(jnp.maximum(context - window, 0), block_tokens) if window else jnp.int32(0)
    end = lax.div(context + block_tokens - 1, block_tokens)
    return first, end, lax.div(end - first + num_splits - 1, num_splits)


def _decode_kernel(
    q: Any,
    page_table: Any,
    kv_lens: Any,
    row_token: Any,
    page_offset: Any,
    *refs: Any,
    static: Walk,
    group: int,
    window: int,
    num_splits: int,
) -> None:
    """refs: the pool's, one that is written into (unread), the outputs'."""
    kv_head, split, row = (pl.program_id(axis) for axis in range(3))
    pool = list(refs[: 4 if static.quantised else 2])
    token, context = compat.load(row_token.at[row]), compat.load(kv_lens.at[row])
    first, end, per_split = _visible_blocks(context, window, static.block_tokens, num_splits)
    low = first + split * per_split
    high = jnp.minimum(low + per_split, end)

    # An empty context still has its zeros to write, when nothing else writes them.
    @pl.when((token >= 0) & ((low < high) | (num_splits == 1)))
    def _() -> None:
        heads = jnp.arange(max(MIN_DOT, pl.next_power_of_2(group)), dtype=jnp.int32)
        dims = jnp.arange(static.padded_dim, dtype=jnp.int32)
        mask = (heads[:, None] < group) & (dims[None, :] < static.head_dim)
        head = kv_head * group + heads
        queries = compat.load(q.at[token, head[:, None], dims[None, :]], mask=mask, other=0.0)

        def hide(start: Array, scores: Array) -> Array:
            position = start + jnp.arange(static.block_tokens, dtype=jnp.int32)
            visible = position < context
            if window:
                visible &= position >= context - window
            return jnp.where(visible[None, :], scores, MASKED)

        sums, peak, total = walk(
            static,
            pool,
            page_table,
            queries.astype(static.compute_dtype),
            row=row,
            kv_head=kv_head,
            page_offset=compat.load(page_offset.at[jnp.int32(0)]),
            blocks=(low, high),
            context=context,
            hide=hide,
        )
        values = normalised(sums, total)
        if num_splits == 1:
            out = refs[-1]
            compat.store(out.at[token, head[:, None], dims[None, :]], values.astype(out.dtype), mask=mask)
        else:
            parts, normalisers = refs[-2:]
            compat.store(parts.at[row, head[:, None], split, dims[None, :]], values, mask=mask)
            compat.store(normalisers.at[row, head, split], peak * static.factor + jnp.log2(total), mask=heads < group)


def _combine_kernel(
    parts: Any,
    normalisers: Any,
    kv_lens: Any,
    row_token: Any,
    *refs: Any,
    padded_dim: int,
    block_tokens: int,
    window: int,
    num_splits: int,
) -> None:
    """One head of one row: its parts weighed by 2 ** normaliser. refs: one that is written into, the output."""
    head, row = pl.program_id(0), pl.program_id(1)
    token, context = compat.load(row_token.at[row]), compat.load(kv_lens.at[row])
    first, end, per_split = _visible_blocks(context, window, block_tokens, num_splits)
    used = lax.div(end - first + per_split - 1, jnp.maximum(per_split, 1))  # the others were never written

    @pl.when(token >= 0)
    def _() -> None:
        out = refs[-1]
        dims = jnp.arange(padded_dim, dtype=jnp.int32)
        inside = dims < out.shape[-1]
        splits = jnp.arange(num_splits, dtype=jnp.int32)
        peak = compat.load(normalisers.at[row, head, splits], mask=splits < used, other=MASKED).max()
        chunk = min(num_splits, SPLITS_AT_A_TIME)

        def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            sums, total = carry
            split = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
            weights = jnp.exp2(
                compat.load(normalisers.at[row, head, split], mask=split < used, other=2 * MASKED) - peak
            )
            mask = (split < used)[:, None] & inside[None, :]
            values = compat.load(parts.at[row, head, split[:, None], dims[None, :]], mask=mask, other=0.0)
            return sums + (values * weights[:, None]).sum(0), total + weights.sum()

        init = (jnp.zeros((padded_dim,), jnp.float32), jnp.float32(0))
        sums, total = lax.fori_loop(0, pl.cdiv(used, chunk), step, init)
        values = sums / jnp.maximum(total, 1e-30)
        compat.store(out.at[token, head, dims], values.astype(out.dtype), mask=inside)
