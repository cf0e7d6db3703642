"""Causal attention of a ragged batch of queries over a paged KV pool: what every backend takes and gives.

    plan = prepare_attention(page_table, query_start, kv_lens, positions, token_row, ...)    once a step
    out  = attend(q, kv, plan, page_offset=layer * N, ...)                                   in every layer

T query tokens in R rows; row r's tokens are query_start[r] .. query_start[r+1]-1, the last tokens of its context of
kv_lens[r]. T == R means a decode step: token r is the only token of row r. Otherwise rows of any length are mixed.
"""

import importlib
from types import ModuleType
from typing import Any

from jax import Array

from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.paged_attention import reference, triton
from pallas_kernels.paged_attention.shape import AttentionShape
from pallas_kernels.storage import KVPool


def unsupported(backend: Backend, shape: AttentionShape) -> str:
    """Why `backend` cannot run attention of this shape; "" if it can."""
    if backend.name == "reference":
        return ""
    if backend.name not in ("triton", "mosaic"):
        return f"there is no backend named {backend.name}"
    if shape.num_heads % shape.num_kv_heads:
        return f"{shape.num_heads} query heads do not divide among {shape.num_kv_heads} KV heads"
    try:
        implementation = _implementation(backend)
    except ImportError as error:
        return str(error)
    return implementation.unsupported(shape)


def prepare_attention(
    page_table: Array,
    query_start: Array,
    kv_lens: Array,
    positions: Array,
    token_row: Array,
    *,
    shape: AttentionShape,
    backend: Backend = REFERENCE,
) -> Any:
    """The backend's plan of one step, a pytree that all layers share.

    page_table: i32[R, M] pages of each row in order; entries past the row's context may be anything in bounds.
    query_start: i32[R+1]. kv_lens: i32[R] tokens in cache after this step, 0 for padding rows.
    positions: i32[T] of each token in its row's sequence. token_row: i32[T]. Tokens past query_start[R] are padding.
    """
    if backend.name == "reference":
        return reference.prepare_attention(page_table, query_start, kv_lens, positions, token_row, shape=shape)
    return _implementation(backend).prepare_attention(
        page_table, query_start, kv_lens, positions, token_row, shape=shape, backend=backend
    )


def attend(
    q: Array,
    kv: KVPool[Array],
    plan: Any,
    *,
    page_offset: int | Array,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    backend: Backend = REFERENCE,
) -> Array:
    """[T, H, D] in q's dtype; softmax and accumulation in float32. Padding tokens get anything finite.

    q: [T, H, D]; query head h reads KV head h // (H / Hkv).
    kv: the whole pool [L*N, P, Hkv, D], this step's keys already written; f32/bf16/f16 like q, or float8 with scales.
    page_offset: layer * N, added to every page: the pool is never sliced.
    scale: multiplies the scores, > 0. window: a query at position p sees positions p-window+1 .. p; 0 = all.
    soft_cap: scores become soft_cap * tanh(score / soft_cap); 0 = off.
    """
    if backend.name == "reference":
        return reference.attend(q, kv, plan, page_offset=page_offset, scale=scale, window=window, soft_cap=soft_cap)
    return _implementation(backend).attend(
        q, kv, plan, page_offset=page_offset, scale=scale, window=window, soft_cap=soft_cap, backend=backend
    )


def _implementation(backend: Backend) -> ModuleType:
    if backend.name == "triton":
        return triton
    # Mosaic GPU needs absl-py, which JAX 0.10.2 does not bring: imported only where it was chosen.
    return importlib.import_module("pallas_kernels.paged_attention.mosaic")
