"""Paged attention: decode steps, prefill, and both mixed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu.case import TOLERANCE, Case, Problem, chain_length, ids, noise
from gpu.models import MODELS
from gpu.roofline import ModelSize, decode_attention, mixed_attention
from pallas_kernels import storage
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.paged_attention import api, triton_decode, triton_mixed
from pallas_kernels.paged_attention.shape import AttentionShape

PAGE_SIZE = 16
ONE_BYTE_HAZARD = (2**31, 2**32)  # elements of one byte between which a kernel's offsets overflow
TUNED_CONTEXT = 2048
MOST_POOL_BYTES = 24 << 30  # of keys, and of values

Rows = list[tuple[int, int]]  # (query tokens, context they end)


@dataclass(frozen=True)
class Model:
    """What attention sees of a model."""

    name: str
    dtype: str
    kv_dtype: str

    @property
    def shape(self) -> AttentionShape:
        size = ModelSize.of(MODELS[self.name])
        return AttentionShape(size.num_heads, size.num_kv_heads, size.head_dim, PAGE_SIZE, self.dtype, self.kv_dtype)

    @property
    def heads(self) -> dict[str, int]:
        shape = self.shape
        return {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim}


def decode_case(model: Model, rows: int, context: int, backends: tuple[str, ...]) -> Case:
    """`rows` rows of one token each, all of the same context."""
    # A configuration is looked up by rows and by the room of the page table, so one context has to stand for all.
    tune = context == TUNED_CONTEXT or model.name == "tiny"
    return _attention_case(model, f"decode {rows} x {context}", [(1, context)] * rows, backends, tune=tune)


def prefill_case(model: Model, tokens: int, backends: tuple[str, ...]) -> Case:
    """One prompt from its start."""
    return _attention_case(model, f"prefill {tokens}", [(tokens, tokens)], backends)


def mixed_case(model: Model, rows: int, context: int, chunk: int, backends: tuple[str, ...]) -> Case:
    """Decoding rows beside the last chunk of a prompt of that context."""
    name = f"mixed {rows} x {context} + {chunk}"
    return _attention_case(model, name, [(1, context)] * rows + [(chunk, context)], backends)


def _attention_case(model: Model, what: str, rows: Rows, backends: tuple[str, ...], *, tune: bool = True) -> Case:
    return Case(
        op="paged_attention",
        name=f"{what}, {model.name}, {model.kv_dtype}",
        sizes={
            "rows": len(rows),
            "tokens": sum(count for count, _ in rows),
            "context": max(context for _, context in rows),
            **model.heads,
            "page_size": PAGE_SIZE,
        },
        dtype=model.kv_dtype,
        tolerance=TOLERANCE[model.dtype],
        backends=backends,
        build=lambda: _attention_problem(model, rows),
        unsupported=lambda backend: api.unsupported(backend, model.shape),
        candidates=lambda backend: _candidates(model, rows, backend),
        tune=tune,
    )


def _candidates(model: Model, rows: Rows, backend: Backend) -> list[Any]:
    shape, num_tokens = model.shape, sum(count for count, _ in rows)
    if num_tokens == len(rows):
        table_tokens = _table_pages(model, rows) * PAGE_SIZE
        decode = triton_decode.decode_candidates(shape, len(rows), table_tokens, backend.num_cores)
        return list(decode) if backend.name == "triton" else []
    if backend.name == "triton":
        return list(triton_mixed.mixed_candidates(shape, num_tokens))
    from pallas_kernels.paged_attention import mosaic  # needs absl

    return list(mosaic.candidates(shape))


def _table_pages(model: Model, rows: Rows) -> int:
    """Pages that a row of the page table has room for, as an engine of this model would have it."""
    return -(-max(MODELS[model.name]["max_position_embeddings"], *(context for _, context in rows)) // PAGE_SIZE)


def _attention_problem(model: Model, rows: Rows) -> Problem:
    shape = model.shape
    item_bytes, kv_item_bytes = jnp.dtype(model.dtype).itemsize, jnp.dtype(model.kv_dtype).itemsize
    decodes = all(count == 1 for count, _ in rows)
    heads: Any = model.heads
    if decodes:
        work = decode_attention(
            [context for _, context in rows], **heads, item_bytes=item_bytes, kv_item_bytes=kv_item_bytes
        )
    else:
        work = mixed_attention(rows, **heads, item_bytes=item_bytes, kv_item_bytes=kv_item_bytes)
    pages = [-(-context // PAGE_SIZE) for _, context in rows]
    num_pages = sum(pages) + 1
    layer_items = num_pages * PAGE_SIZE * shape.num_kv_heads * shape.head_dim
    calls = _layers(chain_length(work.bytes), layer_items, kv_item_bytes)
    batch = _batch(rows, pages, num_pages, _table_pages(model, rows))
    kv = random_pool(model, calls * num_pages)
    queries = noise(2, (int(batch["positions"].shape[0]), shape.num_heads, shape.head_dim), jnp.dtype(model.dtype))
    scale = shape.head_dim**-0.5

    def attend(backend: Backend) -> Callable[..., Any]:
        """Traced once for all layers."""
        return jax.jit(
            lambda q, kv, plan, offset: api.attend(q, kv, plan, page_offset=offset, scale=scale, backend=backend)
        )

    def plan(backend: Backend, batch: dict[str, Any]) -> Any:
        return api.prepare_attention(**batch, shape=shape, backend=backend)

    def chain(backend: Backend, q: Any, data: Any) -> Any:
        _, kv, batch = data
        prepared, attended = plan(backend, batch), attend(backend)
        for layer in range(calls):
            q = attended(q, kv, prepared, jnp.int32(layer * num_pages))
        return q

    def result(backend: Backend, data: Any) -> Any:
        q, kv, batch = data
        return attend(backend)(q, kv, plan(backend, batch), jnp.int32(0))

    def truth(data: Any) -> Any:
        q, kv, batch = data
        return attend(REFERENCE)(q.astype(jnp.float32), _readable(kv, q.dtype), plan(REFERENCE, batch), jnp.int32(0))

    return Problem(calls, work, (queries, kv, batch), lambda: queries, chain, result, truth)


def _readable(kv: storage.KVPool[jax.Array], dtype: Any) -> storage.KVPool[jax.Array]:
    """A pool that float32 queries can read: on CPU, 16 bits stand for the dtype of the queries it was made for."""
    if kv.k.dtype != jnp.uint16:
        return kv
    k, v = (storage.decode(leaf, dtype).astype(jnp.float32) for leaf in (kv.k, kv.v))
    return storage.KVPool(k=k, v=v, k_scale=kv.k_scale, v_scale=kv.v_scale)


def _layers(wanted: int, layer_items: int, kv_item_bytes: int) -> int:
    """Layers of a pool: as many as wanted, as memory holds, and as one-byte offsets reach."""
    layers = max(1, min(wanted, MOST_POOL_BYTES // (layer_items * kv_item_bytes)))
    low, high = ONE_BYTE_HAZARD
    if kv_item_bytes == 1 and low < layers * layer_items <= high and layer_items <= low:
        layers = low // layer_items
    return layers


def _batch(rows: Rows, pages: list[int], num_pages: int, table_pages: int) -> dict[str, Any]:
    """The arrays of a step; pages lie in no order."""
    shuffled = np.random.default_rng(0).permutation(np.arange(1, num_pages))
    table = np.zeros((len(rows), table_pages), np.int32)
    first = 0
    for row, count in enumerate(pages):
        table[row, :count] = shuffled[first : first + count]
        first += count
    counts = [count for count, _ in rows]
    positions = np.concatenate([np.arange(context - count, context) for count, context in rows])
    return {
        "page_table": ids(table),
        "query_start": ids(np.cumsum([0, *counts])),
        "kv_lens": ids([context for _, context in rows]),
        "positions": ids(positions),
        "token_row": ids(np.repeat(np.arange(len(rows)), counts)),
    }


def random_pool(model: Model, num_pages: int) -> storage.KVPool[jax.Array]:
    """A pool of random values, in the layout of this platform."""
    shape = (num_pages, PAGE_SIZE, model.shape.num_kv_heads, model.shape.head_dim)
    stored = storage.storage_dtype(model.kv_dtype, jax.devices()[0].platform)

    def fill(seed: int) -> tuple[Any, Any]:
        values = noise(seed, shape, jnp.dtype(model.dtype))
        if jnp.dtype(model.kv_dtype) == storage.FLOAT8:
            values, scale = storage.quantise(values)
            return storage.encode(values, stored), scale
        return storage.encode(values, stored), jnp.zeros((*shape[:2], 0), jnp.float32)

    filled = jax.jit(fill, static_argnums=0)
    (k, k_scale), (v, v_scale) = filled(0), filled(1)
    return storage.KVPool(k=k, v=v, k_scale=k_scale, v_scale=v_scale)
