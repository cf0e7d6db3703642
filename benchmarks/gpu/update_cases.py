"""Queries and keys rotated, keys and values written into the pages of a pool, in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu.attention_cases import PAGE_SIZE, Model, random_pool
from gpu.case import TOLERANCE, Case, Problem, chain_length, ids, noise
from gpu.roofline import Work
from pallas_kernels import storage
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.kv_update import api, triton


def update_case(model: Model, tokens: int, backends: tuple[str, ...]) -> Case:
    """A step of `tokens` tokens."""
    return Case(
        op="kv_update",
        name=f"{tokens} tokens, {model.name}, {model.kv_dtype}",
        sizes={"tokens": tokens, **model.heads, "page_size": PAGE_SIZE},
        dtype=model.kv_dtype,
        tolerance=TOLERANCE[model.dtype],
        backends=backends,
        build=lambda: _problem(model, tokens),
        unsupported=lambda backend: "",
        candidates=lambda backend: list(triton.candidates()),
    )


def _problem(model: Model, tokens: int) -> Problem:
    shape, dtype = model.shape, jnp.dtype(model.dtype)
    kv_item_bytes = jnp.dtype(model.kv_dtype).itemsize
    each = tokens * shape.num_kv_heads * shape.head_dim  # keys, or values
    scale_bytes = 8 * tokens * shape.num_kv_heads if kv_item_bytes == 1 else 0
    moved = (2 * shape.group + 2) * each * dtype.itemsize + 2 * each * kv_item_bytes
    work = Work(moved + scale_bytes + 4 * tokens * shape.head_dim, 3 * (shape.group + 1) * each)
    calls = chain_length(work.bytes)
    num_pages = -(-tokens // PAGE_SIZE) + 1
    slots = np.random.default_rng(0).permutation(np.arange(PAGE_SIZE, num_pages * PAGE_SIZE))[:tokens]
    angle = noise(4, (tokens, shape.head_dim // 2), jnp.float32)
    fused = (tokens, shape.num_kv_heads, shape.group + 2, shape.head_dim)
    qkv = [noise(10 + layer, fused, dtype) for layer in range(calls)]
    rest = (jnp.cos(angle), jnp.sin(angle), ids(slots))
    queries = jax.ShapeDtypeStruct((tokens, shape.num_heads, shape.head_dim), dtype)

    def update(backend: Backend) -> Callable[..., Any]:
        return jax.jit(
            lambda kv, qkv, cos, sin, slots, offset: api.update_kv(
                kv, qkv, cos, sin, slots, page_offset=offset, backend=backend
            )
        )

    def chain(backend: Backend, state: Any, data: Any) -> Any:
        (kv, _), (qkv, rest, _) = state, data
        updated, rotated = update(backend), []
        for layer in range(calls):
            q, kv = updated(kv, qkv[layer], *rest, jnp.int32(layer * num_pages))
            rotated.append(q)
        return kv, rotated

    def result(backend: Backend, data: Any) -> Any:
        qkv, rest, blank = data
        q, kv = update(backend)(blank, qkv[0], *rest, jnp.int32(0))
        return q, storage.decode(kv.k, dtype), storage.decode(kv.v, dtype), kv.k_scale, kv.v_scale

    return Problem(
        calls=calls,
        work=work,
        data=(qkv, rest, random_pool(model, num_pages)),
        state=lambda: (
            random_pool(model, calls * num_pages),
            [jnp.zeros(queries.shape, queries.dtype) for _ in range(calls)],
        ),
        chain=chain,
        result=result,
        truth=lambda data: result(REFERENCE, data),
        donated=True,
    )
