"""Paged attention in Pallas-Triton: arguments and results as in api.py.

A decode step is one kernel, or two where contexts are split. A mixed step is the kernel of tiles, then the decode
kernel for the rows that have a single token, in place.
"""

import jax.numpy as jnp
from flax import struct
from jax import Array

from pallas_kernels import tuning
from pallas_kernels.backend import Backend
from pallas_kernels.paged_attention.shape import AttentionShape
from pallas_kernels.paged_attention.triton_decode import (
    DECODE,
    DecodePlan,
    attend_decode,
    decode_heuristic,
    decode_key,
)
from pallas_kernels.paged_attention.triton_mixed import (
    MIXED,
    Tiles,
    attend_mixed,
    make_tiles,
    mixed_heuristic,
    mixed_key,
)
from pallas_kernels.storage import KVPool

MAX_HEAD_DIM = 256
MAX_GROUP = 64


@struct.dataclass
class MixedPlan:
    """A mixed step: tiles of the rows with several tokens, and the rows with one."""

    tiles: Tiles
    decode: DecodePlan


def unsupported(shape: AttentionShape) -> str:
    """Why this backend cannot run attention of this shape; "" if it can."""
    if shape.head_dim > MAX_HEAD_DIM:
        return f"head_dim {shape.head_dim} is more than {MAX_HEAD_DIM}"
    if shape.head_dim % 8:
        return f"head_dim {shape.head_dim} is not a multiple of 8"
    if shape.page_size & (shape.page_size - 1):
        return f"page_size {shape.page_size} is not a power of two"
    if shape.group > MAX_GROUP:
        return f"{shape.group} query heads a KV head are more than {MAX_GROUP}"
    return ""


def prepare_attention(
    page_table: Array,
    query_start: Array,
    kv_lens: Array,
    positions: Array,
    token_row: Array,
    *,
    shape: AttentionShape,
    backend: Backend,
) -> DecodePlan | MixedPlan:
    """The plan of a step: static launch configurations, and which token or tile is whose."""
    num_rows, num_tokens = page_table.shape[0], positions.shape[0]
    max_tokens = page_table.shape[1] * shape.page_size
    decode_config = tuning.choose(
        DECODE,
        backend.device,
        decode_key(shape, num_rows),
        decode_heuristic(shape, num_rows, max_tokens, backend.num_cores),
    )
    if num_tokens == num_rows:
        return DecodePlan(page_table, kv_lens, jnp.arange(num_rows, dtype=jnp.int32), decode_config)
    mixed_config = tuning.choose(
        MIXED,
        backend.device,
        mixed_key(shape, num_tokens),
        mixed_heuristic(shape, num_tokens),
    )
    single = query_start[1:] - query_start[:-1] == 1
    return MixedPlan(
        tiles=make_tiles(page_table, query_start, kv_lens, num_tokens, group=shape.group, config=mixed_config),
        decode=DecodePlan(page_table, kv_lens, jnp.where(single, query_start[:-1], -1), decode_config),
    )


def attend(
    q: Array,
    kv: KVPool[Array],
    plan: DecodePlan | MixedPlan,
    *,
    page_offset: int | Array,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    backend: Backend,
) -> Array:
    """Attention over the pool."""
    offset = jnp.asarray(page_offset, jnp.int32)
    if isinstance(plan, DecodePlan):
        return attend_decode(
            q, kv, plan, page_offset=offset, scale=scale, window=window, soft_cap=soft_cap, backend=backend
        )
    out = attend_mixed(
        q, kv, plan.tiles, page_offset=offset, scale=scale, window=window, soft_cap=soft_cap, backend=backend
    )
    return attend_decode(
        q, kv, plan.decode, page_offset=offset, scale=scale, window=window, soft_cap=soft_cap, backend=backend,
        into=(out,),
    )  # fmt: skip
