"""Pallas-Triton adapters over the plan of grouped_matmul: the tokens of one adapter share a program.

Shrinking is a grouped product with few outputs, so the contraction is split to fill the device. Expanding contracts
over the rank alone and adds to the base model's output in place; tokens without an adapter are not
touched.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels import tuning
from pallas_kernels.backend import Backend
from pallas_kernels.compat import dot, load, store, triton_call
from pallas_kernels.grouped_matmul import triton as grouped
from pallas_kernels.grouped_matmul.plan import GroupPlan

SHRINK, EXPAND = "lora_shrink", "lora_expand"
LEAST_RANK = 16  # of a tile: the shortest contraction of a tensor core; lower ranks are masked
HIGHEST_RANK = 128
MAX_SPLITS = 32


@dataclass(frozen=True)
class ExpandConfig:
    """block_n outputs a tile, block_k of the rank at a time."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def unsupported(rank: int, weight_dtype: DTypeLike, dtype: DTypeLike) -> str:
    """Why these kernels cannot apply such adapters to activations of `dtype`; "" if they can."""
    if rank > HIGHEST_RANK:
        return f"rank {rank} is above {HIGHEST_RANK}"
    if weight_dtype != dtype:
        return f"adapters are {jnp.dtype(weight_dtype).name}, activations {jnp.dtype(dtype).name}"
    return ""


def shrink_heuristic(num_blocks: int, weights: Any, block_rows: int, num_cores: int) -> grouped.Config:
    """Shares of the contraction that give every core two programs, each of at least four blocks."""
    _, num_inputs, rank = weights.shape
    block_n = max(LEAST_RANK, pl.next_power_of_2(rank))
    block_k = 128 if weights.dtype.itemsize < 4 and block_rows < 128 else 32
    splits = 1
    while splits < MAX_SPLITS and num_blocks * splits < 2 * num_cores and num_inputs >= 8 * splits * block_k:
        splits *= 2
    return grouped.Config(block_n, block_k, splits, num_warps=4 if block_rows < 128 else 8, num_stages=3)


def shrink_candidates(num_blocks: int, weights: Any, block_rows: int, num_cores: int) -> list[grouped.Config]:
    """What is worth measuring; the heuristic comes first."""
    first = shrink_heuristic(num_blocks, weights, block_rows, num_cores)
    others = [
        grouped.Config(first.block_n, k, splits, first.num_warps, stages)
        for k in (64, 128)
        for splits in (first.num_splits // 2, first.num_splits, first.num_splits * 2)
        for stages in (2, 4)
        if splits
    ]
    return [first, *(config for config in others if config != first)]


def expand_heuristic(weights: Any, block_rows: int) -> ExpandConfig:
    """A configuration for sizes that nobody measured."""
    warps = 8 if block_rows >= 128 else 4
    if weights.dtype.itemsize == 4:
        return ExpandConfig(block_n=32, block_k=LEAST_RANK, num_warps=warps, num_stages=2)
    rank = max(LEAST_RANK, pl.next_power_of_2(weights.shape[1]))
    return ExpandConfig(block_n=128, block_k=rank, num_warps=warps, num_stages=2)


def expand_candidates(weights: Any, block_rows: int) -> list[ExpandConfig]:
    """What is worth measuring; the heuristic comes first."""
    first = expand_heuristic(weights, block_rows)
    others = [ExpandConfig(n, first.block_k, warps, 2) for n in (64, 128) for warps in (4, 8)]
    return [first, *(config for config in others if config != first)]


def shrink(x: Array, a: Array, plan: GroupPlan, *, backend: Backend, config: grouped.Config | None = None) -> Array:
    """f32[T, R]; arguments as in api.py. config: instead of the one chosen, to measure it."""
    num_blocks, block_rows = plan.block_rows.shape
    if config is None:
        key = shrink_key(num_blocks, a, block_rows)
        heuristic = shrink_heuristic(num_blocks, a, block_rows, backend.num_cores)
        config = tuning.choose(SHRINK, backend.device, key, heuristic)
    return grouped.grouped_matmul(
        x, a, plan, rows_per_token=1, out_dtype=jnp.float32, backend=backend, config=config, name=SHRINK
    )


def expand(
    shrunk: Array, b: Array, y: Array, plan: GroupPlan, *, backend: Backend, config: ExpandConfig | None = None
) -> Array:
    """[T, N] in y's dtype; arguments as in api.py. config: instead of the one chosen, to measure it."""
    num_blocks, block_rows = plan.block_rows.shape
    if config is None:
        key = grouped.config_key(b, block_rows)
        config = tuning.choose(EXPAND, backend.device, key, expand_heuristic(b, block_rows))
    return triton_call(
        functools.partial(_expand_kernel, config=config),
        name=EXPAND,
        grid=(num_blocks, pl.cdiv(b.shape[2], config.block_n)),
        out_shape=jax.ShapeDtypeStruct(y.shape, y.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=backend.interpret,
        aliases={4: 0},
    )(shrunk, b, plan.block_group, plan.block_rows, y)


def shrink_key(num_blocks: int, weights: Any, block_rows: int) -> dict[str, int | str]:
    """What a configuration is looked up by: as for a grouped product, and how many programs there are."""
    return grouped.config_key(weights, block_rows) | {"blocks": pl.next_power_of_2(num_blocks)}


def _expand_kernel(
    shrunk: Any, b: Any, block_group: Any, block_rows: Any, y: Any, out: Any, *, config: ExpandConfig
) -> None:
    """out is y."""
    num_adapters, rank, num_outputs = b.shape
    number_of_block, tile = pl.program_id(0), pl.program_id(1)
    adapter = load(block_group.at[number_of_block])

    @pl.when((adapter >= 0) & (adapter < num_adapters))
    def _() -> None:
        rows = load(block_rows.at[number_of_block, jnp.arange(block_rows.shape[1])])[:, None]
        columns = (tile * config.block_n + jnp.arange(config.block_n))[None, :]
        num_tokens = out.shape[0]
        sources = jnp.minimum(rows, num_tokens - 1)
        lane = jnp.arange(config.block_k)

        def block(number: Array, total: Array) -> Array:
            k = number * config.block_k + lane
            left = load(shrunk.at[sources, k[None, :]], mask=(rows < num_tokens) & (k < rank)[None, :], other=0.0)
            mask = (k < rank)[:, None] & (columns < num_outputs)
            right = load(b.at[adapter, k[:, None], columns], mask=mask, other=0.0)
            return total + dot(left.astype(right.dtype), right, allow_tf32=False)

        init = jnp.zeros((rows.shape[0], config.block_n), jnp.float32)
        delta = lax.fori_loop(0, pl.cdiv(rank, config.block_k), block, init)
        mask = (rows < num_tokens) & (columns < num_outputs)
        total = load(y.at[sources, columns], mask=mask, other=0.0).astype(jnp.float32) + delta
        store(out.at[rows, columns], total.astype(out.dtype), mask=mask)
