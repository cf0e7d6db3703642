"""The walk both Triton kernels share: a tile of queries over a stretch of one row's context, with an online softmax.

The queries of all heads that share a KV head, and of all tokens of the tile, are the rows of one matrix [X, D]. The
walk takes the context one block of tokens at a time: page ids, keys, values. Page ids are loaded one block ahead and
carried, so that the compiler sees the loads of keys and values as depending on nothing in memory and keeps several
blocks of them on their way (cp.async). Tiles are loaded as [pages, slots, D]: one id per page, and float8 is converted
before the tile is laid out for the tensor cores, which a load of [tokens, D] would have the wrong way round.

The pool is seen as [L*N*P*Hkv, D], which costs nothing, so that one multiplication makes an address. Blocks start at
multiples of their size whatever the window, hence a token's sums are always grouped alike.

Scores stay as the matrix product gave them; `factor` turns them into powers of two where they are exponentiated, one
fused multiply-add and one ex2 (Dao et al. 2022 fold the scale the same way). float8 keys and values are converted to
float16, which holds every float8 and converts four times as fast as bfloat16; their scales multiply scores and weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.storage import KVPool, decode, quantised

MASKED = -1e30  # a hidden score
LOWEST = -1e20  # the first running maximum: above MASKED, so that a wholly hidden block weighs nothing
MIN_DOT = 16  # smallest side of a matrix product
# Weights times the scales of float8 values must not leave float16's range: peaks of a token's values may lie between
# 1e-5 and 7000. The factor of 2 ** WEIGHT_SHIFT divides out with the total.
WEIGHT_SHIFT = 12.0


@dataclass(frozen=True)
class Walk:
    """What is static about a walk."""

    num_kv_heads: int  # Hkv
    head_dim: int  # D
    page_size: int  # P
    block_tokens: int  # context tokens taken at a time: a power of two, as P is
    scale: float
    soft_cap: float
    dtype: Any  # of the queries
    quantised: bool
    interpret: bool

    @property
    def padded_dim(self) -> int:
        """As the function of this name."""
        return padded_dim(self.head_dim)

    @property
    def compute_dtype(self) -> Any:
        """What goes into the matrix products."""
        return jnp.dtype(jnp.float16) if self.quantised and self.dtype != jnp.float32 else self.dtype

    @property
    def factor(self) -> float:
        """Scores (after the cap, in units of the cap) times this are exponents of two."""
        return (self.soft_cap or self.scale) * math.log2(math.e)


def make_walk(
    q: Array, kv: KVPool[Array], *, block_tokens: int, scale: float, soft_cap: float, interpret: bool
) -> Walk:
    """The walk of queries [T, H, D] over a pool."""
    _, page_size, num_kv_heads, head_dim = kv.k.shape
    return Walk(
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        block_tokens=block_tokens,
        scale=scale,
        soft_cap=soft_cap,
        dtype=jnp.dtype(q.dtype),
        quantised=quantised(kv.k),
        interpret=interpret,
    )


def padded_dim(head_dim: int) -> int:
    """D as a kernel has it: arrays there have powers of two as sizes, and what is past D is masked."""
    return max(MIN_DOT, pl.next_power_of_2(head_dim))


def block_size(head_dim: int, itemsize: int) -> int:
    """Context tokens whose keys and values fill about 32 KiB, which several blocks on their way leave room for."""
    return min(64, max(MIN_DOT, 32768 // (2 * padded_dim(head_dim) * itemsize)))


def pool_operands(kv: KVPool[Array]) -> list[Array]:
    """The pool as `walk` wants it: keys, values [L*N*P*Hkv, D], and, of a float8 pool, their scales [L*N*P*Hkv]."""
    head_dim = kv.k.shape[-1]
    operands = [kv.k.reshape(-1, head_dim), kv.v.reshape(-1, head_dim)]
    return [*operands, kv.k_scale.reshape(-1), kv.v_scale.reshape(-1)] if quantised(kv.k) else operands


def walk(
    static: Walk,
    pool: list[Any],
    page_table: Any,
    queries: Array,
    *,
    row: Array,
    kv_head: Array,
    page_offset: Array,
    blocks: tuple[Array, Array],
    context: Array,
    hide: Callable[[Array, Array], Array],
) -> tuple[Array, Array, Array]:
    """Attention over blocks[0] <= block < blocks[1] of a row: (f32[X, D] sums, f32[X] maxima, f32[X] totals).

    pool, page_table: refs, of `pool_operands` and i32[R, M]. queries: [X, D] in compute_dtype.
    context: tokens that may be read; what lies behind is never loaded, so it may be anything, NaN too.
    hide: (position of the block's first token, scores [X, block]) -> scores with MASKED where a query must not look.
    Sums divided by totals are the result; a maximum times static.factor plus log2(total) its log2 normaliser.
    """
    size, page_size = static.block_tokens, static.page_size
    block_pages = max(1, size // page_size)
    run = min(size, page_size)  # tokens of a block that share a page
    dims = jnp.arange(static.padded_dim, dtype=jnp.int32)
    precision = lax.Precision.HIGHEST if static.dtype == jnp.float32 else lax.Precision.DEFAULT

    def page_ids(block: Array) -> Array:
        first = lax.div(block * size, page_size)
        pages = first + jnp.arange(block_pages, dtype=jnp.int32)
        return compat.load(page_table.at[row, pages], mask=pages * page_size < context, other=0) + page_offset

    def step(block: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        sums, peak, total, pages = carry
        start = block * size
        slots = lax.rem(start, page_size) + jnp.arange(run, dtype=jnp.int32)
        lines = (pages[:, None] * page_size + slots[None, :]) * static.num_kv_heads + kv_head
        position = start + jnp.arange(block_pages, dtype=jnp.int32)[:, None] * run + jnp.arange(run, dtype=jnp.int32)
        valid = position < context
        shape = (block_pages, run, static.padded_dim)
        mask = jnp.broadcast_to(valid[:, :, None], shape)
        if static.padded_dim != static.head_dim:
            mask &= dims[None, None, :] < static.head_dim

        def tile(ref: Any) -> Array:
            where = ref.at[lines[:, :, None], dims[None, None, :]]
            stored = compat.load(where, mask=mask, other=jnp.zeros(shape, ref.dtype))
            return decode(stored, static.compute_dtype).reshape(size, static.padded_dim)

        def scales(ref: Any) -> Array:
            return compat.load(ref.at[lines], mask=valid, other=0.0).reshape(1, size)

        scores = compat.dot(queries, tile(pool[0]).T, precision=precision)
        if static.quantised:
            scores *= scales(pool[2])
        if static.soft_cap:
            scores = _tanh(static, scores)
        scores = hide(start, scores)
        new_peak = jnp.maximum(peak, scores.max(1))
        # The difference first: a row that has seen nothing yet has LOWEST twice, and must get exactly 1.
        rescale = _exp2(static, peak - new_peak, jnp.zeros_like(peak))
        shift = WEIGHT_SHIFT if static.quantised else 0.0
        weights = _exp2(static, scores, (shift - new_peak * static.factor)[:, None])
        total = total * rescale + weights.sum(1)
        if static.quantised:
            weights *= scales(pool[3])
        product = compat.dot(weights.astype(static.compute_dtype), tile(pool[1]), precision=precision)
        return sums * rescale[:, None] + product, new_peak, total, page_ids(block + 1)

    num_queries = queries.shape[0]
    init = (
        jnp.zeros((num_queries, static.padded_dim), jnp.float32),
        jnp.full((num_queries,), LOWEST, jnp.float32),
        jnp.zeros((num_queries,), jnp.float32),
        page_ids(blocks[0]),
    )
    return lax.fori_loop(*blocks, step, init)[:3]


def normalised(sums: Array, totals: Array) -> Array:
    """Sums over totals; zeros where nothing was visible."""
    return sums / jnp.maximum(totals, 1e-30)[:, None]


def _exp2(static: Walk, scores: Array, offset: Array) -> Array:
    """2 ** (scores * factor + offset) by one multiply-add and one ex2, where exp2 would take five instructions."""
    if static.interpret:
        return jnp.exp2(scores * static.factor + offset)
    return _machine_code(
        "fma.rn.f32 $0, $1, $2, $3; ex2.approx.ftz.f32 $0, $0;",
        scores,
        jnp.full(scores.shape, static.factor, jnp.float32),
        jnp.broadcast_to(offset, scores.shape),
    )


def _tanh(static: Walk, scores: Array) -> Array:
    """tanh(scores * scale / soft_cap) = 1 - 2 / (e ** 2x + 1): as exact as float32 where tanh.approx is not."""
    factor = 2 * math.log2(math.e) * static.scale / static.soft_cap
    if static.interpret:
        return 1.0 - 2.0 / (jnp.exp2(scores * factor) + 1.0)
    return _machine_code(
        "mul.rn.f32 $0, $1, $2; ex2.approx.ftz.f32 $0, $0; add.rn.f32 $0, $0, 0f3F800000;"
        " rcp.approx.ftz.f32 $0, $0; fma.rn.f32 $0, $0, 0fC0000000, 0f3F800000;",
        scores,
        jnp.full(scores.shape, factor, jnp.float32),
    )


def _machine_code(code: str, *operands: Array) -> Array:
    """PTX for every element of float32 arrays of one shape; $0, the result, is written before all operands are read."""
    (result,) = compat.inline_asm(
        code,
        args=operands,
        constraints=",".join(["=&f"] + ["f"] * len(operands)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)],
    )
    return result
