"""The Hopper kernel of a mixed step: prefill chunks and decode rows over flat tokens, wgmma fed by TMA.

    in   q [T, H, D], the whole pool [L*N, P, Hkv, D], page tables, and five numbers a tile
    out  [T, H, D]

One thread block is one KV head of one tile: `tile_tokens` consecutive tokens of a row times the G query heads that
share the KV head, as rows of one matrix (row = head * tile_tokens + token). One warpgroup does nothing but fetch: every
page is one TMA copy into a ring of `num_stages` blocks of keys and values. The others hold 64 rows each, multiply
(wgmma), and keep the running softmax in registers (Dao 2023, "FlashAttention-2"; Shah et al. 2024, "FlashAttention-3").

Finished rows leave by TMA, which writes whole boxes: a tile of n tokens is stored as the powers of two that sum to n,
so that no row of a neighbour is touched.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import compat

WARPGROUP_ROWS = 64  # rows of a wgmma
TILE_ALIGNMENT = 8  # rows of a swizzled block of shared memory
MASKED = -1e30  # finite: a block in which a row sees nothing must not make a NaN of it
FETCH_REGISTERS, COMPUTE_REGISTERS = 56, 224  # of a thread; 168 each is what three warpgroups start with
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class MixedConfig:
    """Launch configuration."""

    num_warpgroups: int  # that compute
    block_kv: int  # context tokens of one step of the walk
    num_stages: int  # blocks in the ring


@struct.dataclass
class Tiles:
    """Which tokens a thread block computes. B tiles; a tile of no row has no tokens."""

    row: Array  # i32[B]
    token: Array  # i32[B] first token
    num_tokens: Array  # i32[B]
    position: Array  # i32[B] of the first token in its sequence
    context: Array  # i32[B] tokens in cache of the row; 0: nothing to attend to, the outputs are zeros


def attend_tiles(
    q: Array,
    k: Array,
    v: Array,
    page_table: Array,
    tiles: Tiles,
    page_offset: Array,
    *,
    tile_tokens: int,
    config: MixedConfig,
    scale: float,
    window: int,
    soft_cap: float,
    interpret: bool,
) -> Array:
    """[T, H, D] like q; every token is in exactly one tile. Arguments as in api.py; scale is positive.

    page_table: i32[R, M], M a multiple of the pages of a block. page_offset: i32[1].
    interpret: run on any device with plain products instead of wgmma, which nothing can interpret.
    """
    plgpu = compat.mosaic()
    num_tokens, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    num_warpgroups, block_kv, num_stages = config.num_warpgroups, config.block_kv, config.num_stages
    rows = num_warpgroups * WARPGROUP_ROWS
    run = min(page_size, block_kv)  # tokens of one copy
    num_runs = block_kv // run
    maths = _plain(plgpu) if interpret else _hopper(plgpu)
    # The last tile may reach past the last token: TMA reads zeros there, the interpreter refuses to.
    beyond = tile_tokens if interpret else max(0, tile_tokens - num_tokens)
    padded = jnp.pad(q, ((0, beyond), (0, 0), (0, 0)))

    def kernel(
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        table_ref: Any,
        row_ref: Any,
        token_ref: Any,
        num_tokens_ref: Any,
        position_ref: Any,
        context_ref: Any,
        offset_ref: Any,
        out_ref: Any,
        q_smem: Any,
        k_smem: Any,
        v_smem: Any,
        out_smem: Any,
        q_ready: Any,
        k_ready: Any,
        v_ready: Any,
        k_free: Any,
        v_free: Any,
        meeting: Any,
    ) -> None:
        kv_head, tile = lax.axis_index("kv_head"), lax.axis_index("tile")
        warpgroup = lax.axis_index("warpgroup")
        token, count = token_ref[tile], num_tokens_ref[tile]
        position, context = position_ref[tile], context_ref[tile]
        begin = jnp.maximum(position - (window - 1), 0) // block_kv if window else jnp.int32(0)
        end = pl.cdiv(jnp.minimum(context, position + count), jnp.int32(block_kv))

        @pl.when(warpgroup == num_warpgroups)
        def fetch() -> None:
            if num_warpgroups > 1:
                plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
            for head in range(group):
                plgpu.copy_gmem_to_smem(
                    q_ref.at[pl.ds(token, tile_tokens), kv_head * group + head],
                    q_smem.at[pl.ds(head * tile_tokens, tile_tokens)],
                    q_ready,
                )
            row, offset = row_ref[tile], offset_ref[0]

            @pl.loop(begin, end)
            def _(block: Array) -> None:
                step = block - begin
                slot = lax.rem(step, jnp.int32(num_stages))
                for ref, smem, ready, free in ((k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)):

                    @pl.when(step >= num_stages)
                    def _(free: Any = free) -> None:
                        plgpu.barrier_wait(free.at[slot])

                    for i in range(num_runs):
                        at = block * block_kv + i * run
                        # Read once more for the values: it is cached, and registers are few here.
                        page = table_ref[row, at // page_size] + offset
                        plgpu.copy_gmem_to_smem(
                            ref.at[page, pl.ds(lax.rem(at, jnp.int32(page_size)), run), kv_head],
                            smem.at[slot, pl.ds(i * run, run)],
                            ready.at[slot],
                        )

            @pl.loop(jnp.maximum(begin, end - num_stages), end)
            def _(block: Array) -> None:
                # No arrival is left unseen, which the interpreter insists on.
                slot = lax.rem(block - begin, jnp.int32(num_stages))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

        @pl.when(warpgroup < num_warpgroups)
        def compute() -> None:
            if num_warpgroups > 1:
                plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            my_rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
            score_shape, out_shape = (WARPGROUP_ROWS, block_kv), (WARPGROUP_ROWS, head_dim)

            def iota(shape: tuple[int, int], axis: int) -> Array:
                return maths.tile(lax.broadcasted_iota(jnp.int32, shape, axis))

            def meet() -> None:
                """Shared memory that any computing warpgroup wrote may be read by all of them, wgmma and TMA."""
                plgpu.commit_smem()
                if num_warpgroups > 1:
                    plgpu.barrier_arrive(meeting)
                    plgpu.barrier_wait(meeting)

            def clear_stale_values(block: Array, slot: Array) -> None:
                """Zeros the values past the context: a NaN left there would survive a weight of zero."""
                for chunk in range(block_kv // WARPGROUP_ROWS):

                    @pl.when(warpgroup == chunk % num_warpgroups)
                    def _(chunk: int = chunk) -> None:
                        values = v_smem.at[slot, pl.ds(chunk * WARPGROUP_ROWS, WARPGROUP_ROWS)]
                        at = iota(out_shape, 0) + (block * block_kv + chunk * WARPGROUP_ROWS)
                        values[...] = jnp.where(at < context, values[...], jnp.zeros((), q.dtype))

                meet()

            def walk(block: Array, carry: tuple[Array, Array, Array], *, masked: bool) -> tuple[Array, Array, Array]:
                out, peak, total = carry
                slot = lax.rem(block - begin, jnp.int32(num_stages))
                if masked:
                    # Before the scores, while registers are free.
                    plgpu.barrier_wait(v_ready.at[slot])

                    @pl.when((block + 1) * block_kv > context)
                    def _() -> None:
                        clear_stale_values(block, slot)

                plgpu.barrier_wait(k_ready.at[slot])
                scores = maths.scores(q_smem.at[my_rows], k_smem.at[slot])
                plgpu.barrier_arrive(k_free.at[slot])
                factor = scale * LOG2_E
                if soft_cap:
                    # tanh by way of exp2, because the hardware's tanh is good to 11 bits only.
                    tanh = 1.0 - 2.0 / (1.0 + jnp.exp2(scores * (2.0 * LOG2_E * scale / soft_cap)))
                    scores, factor = tanh, soft_cap * LOG2_E
                if masked:
                    key = iota(score_shape, 1) + block * block_kv
                    row = iota(score_shape, 0) + warpgroup * WARPGROUP_ROWS
                    query = lax.rem(row, jnp.int32(tile_tokens)) + position
                    visible = key <= query
                    if window:
                        visible &= key > query - window
                    scores, factor = jnp.where(visible, scores * factor, MASKED), 1.0
                new_peak = jnp.maximum(peak, scores.max(axis=1) * factor)
                rescale = jnp.exp2(peak - new_peak)
                weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_peak, score_shape, [0]))
                total = total * rescale + weights.sum(axis=1)
                out = out * lax.broadcast_in_dim(rescale, out_shape, [0])
                if not masked:
                    plgpu.barrier_wait(v_ready.at[slot])
                out = maths.accumulate(out, weights.astype(q.dtype), v_smem.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
                return out, new_peak, total

            plgpu.barrier_wait(q_ready)
            carry = (
                maths.tile(jnp.zeros(out_shape, jnp.float32)),
                maths.tile_rows(jnp.full((WARPGROUP_ROWS,), MASKED, jnp.float32)),
                maths.tile_rows(jnp.zeros((WARPGROUP_ROWS,), jnp.float32)),
            )
            # Every query sees the blocks that end before the first one; with a window they are few anyway.
            causal = begin if window else jnp.minimum((position + 1) // block_kv, end)
            carry = lax.fori_loop(begin, causal, lambda block, c: walk(block, c, masked=False), carry)
            out, _, total = lax.fori_loop(causal, end, lambda block, c: walk(block, c, masked=True), carry)
            out = out * lax.broadcast_in_dim(1.0 / jnp.maximum(total, 1e-30), out_shape, [0])
            compat.mosaic_store(out_smem.at[my_rows], out.astype(q.dtype))
            meet()

            @pl.when(warpgroup == 0)
            def store() -> None:
                size = 1
                while size <= min(tile_tokens, num_tokens):

                    @pl.when((count & size) != 0)
                    def _(size: int = size) -> None:
                        done = count & -(2 * size)  # tokens in larger boxes
                        for head in range(group):
                            plgpu.copy_smem_to_gmem(
                                out_smem.at[pl.ds(head * tile_tokens + done, size)],
                                out_ref.at[pl.ds(token + done, size), kv_head * group + head],
                            )

                    size *= 2
                plgpu.wait_smem_to_gmem(0)

    swizzled = (plgpu.TilingTransform((TILE_ALIGNMENT, 64)), plgpu.SwizzleTransform(128))
    num_tiles = tiles.row.shape[0]
    return plgpu.kernel(
        kernel,
        kernel_name="paged_attention_mixed",
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(num_kv_heads, num_tiles),
        grid_names=("kv_head", "tile"),
        num_threads=num_warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((rows, head_dim), q.dtype, transforms=swizzled),
            plgpu.SMEM((num_stages, block_kv, head_dim), q.dtype, transforms=swizzled),
            plgpu.SMEM((num_stages, block_kv, head_dim), q.dtype, transforms=swizzled),
            plgpu.SMEM((rows, head_dim), q.dtype),
            plgpu.Barrier(num_arrivals=group),
            plgpu.Barrier(num_arrivals=num_runs, num_barriers=num_stages),
            plgpu.Barrier(num_arrivals=num_runs, num_barriers=num_stages),
            plgpu.Barrier(num_arrivals=num_warpgroups, num_barriers=num_stages),
            plgpu.Barrier(num_arrivals=num_warpgroups, num_barriers=num_stages),
            plgpu.Barrier(num_arrivals=num_warpgroups),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=compat.mosaic_interpreter() if interpret else None,
    )(padded, k, v, page_table, tiles.row, tiles.token, tiles.num_tokens, tiles.position, tiles.context, page_offset)


@dataclass(frozen=True)
class _Maths:
    """What a warpgroup does with its registers; only this differs when the kernel is interpreted."""

    tile: Callable[[Array], Array]  # lays [64, n] down in registers as wgmma does
    tile_rows: Callable[[Array], Array]  # the same of [64], a number a row
    scores: Callable[[Any, Any], Array]  # (queries [64, D], keys [block_kv, D]) -> f32[64, block_kv]
    accumulate: Callable[[Array, Array, Any], Array]  # (out f32[64, D], weights [64, block_kv], values) -> out


def _hopper(plgpu: ModuleType) -> _Maths:
    def tile(values: Array) -> Array:
        return plgpu.layout_cast(values, plgpu.Layout.WGMMA)

    def tile_rows(values: Array) -> Array:
        return plgpu.layout_cast(values, plgpu.Layout.WGMMA.reduce(1))

    def scores(queries: Any, keys: Any) -> Array:
        def multiply(accumulator: Any) -> Array:
            plgpu.wgmma(accumulator, queries, keys.transpose((1, 0)))
            return accumulator[...]

        return pl.run_scoped(multiply, plgpu.ACC((queries.shape[0], keys.shape[0]), jnp.float32))

    def accumulate(out: Array, weights: Array, values: Any) -> Array:
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, values))(plgpu.ACC.init(out))

    return _Maths(tile, tile_rows, scores, accumulate)


def _plain(plgpu: ModuleType) -> _Maths:
    def unchanged(values: Array) -> Array:
        return values

    def read(shared: Any) -> Array:
        values = shared[...].astype(jnp.float32)
        # wgmma reads as TMA does; a plain read must be fenced before TMA may write there again.
        plgpu.commit_smem()
        return values

    def scores(queries: Any, keys: Any) -> Array:
        return read(queries) @ read(keys).T

    def accumulate(out: Array, weights: Array, values: Any) -> Array:
        return out + weights.astype(jnp.float32) @ read(values)

    return _Maths(unchanged, unchanged, scores, accumulate)
