"""Pallas-Triton grouped product: one program for a block of the plan, a tile of outputs and a share of the contraction.

Programs gather the rows of their block from x and stream their group's weight past them (Gale et al. 2022,
"MegaBlocks"; Kwon et al.'s fused MoE). Rows without a group take no step of the contraction and so get zeros.
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
from pallas_kernels.grouped_matmul.plan import GroupPlan

OP = "grouped_matmul"
BLOCK_SIZES = (16, 32, 64, 128)  # 16 is the least a tensor core takes, 64 the least of a warp group


@dataclass(frozen=True)
class Config:
    """block_n outputs a tile, block_k inputs at a time, the contraction in num_splits shares; rows are the plan's."""

    block_n: int
    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int


def unsupported(weights: Any, dtype: DTypeLike) -> str:
    """Why this kernel cannot multiply rows of `dtype` by these weights; "" if it can."""
    if weights.dtype != dtype:
        return f"weights are {jnp.dtype(weights.dtype).name}, activations {jnp.dtype(dtype).name}"
    return ""


def block_size(num_rows: int, num_groups: int) -> int:
    """The smallest size that an average group fits into, so that its weight is read once."""
    average = pl.cdiv(num_rows, num_groups)
    return next((size for size in BLOCK_SIZES if average <= size), BLOCK_SIZES[-1])


def config_key(weights: Any, block_rows: int) -> dict[str, int | str]:
    """What a configuration is looked up by."""
    num_groups, num_inputs, num_outputs = weights.shape
    return {
        "block_rows": block_rows,
        "groups": num_groups,
        "inputs": num_inputs,
        "outputs": num_outputs,
        "dtype": jnp.dtype(weights.dtype).name,
    }


def heuristic(weights: Any, block_rows: int) -> Config:
    """A configuration for sizes that nobody measured: registers and shared memory known to suffice."""
    _, num_inputs, num_outputs = weights.shape
    narrow = pl.next_power_of_2(max(16, num_outputs))
    short = pl.next_power_of_2(max(16, num_inputs))
    if weights.dtype.itemsize == 4:
        return Config(min(32, narrow), min(32, short), 1, num_warps=8 if block_rows > 32 else 4, num_stages=2)
    warps = 8 if block_rows >= 128 else 4
    return Config(min(128, narrow), min(64, short), num_splits=1, num_warps=warps, num_stages=4)


def candidates(weights: Any, block_rows: int) -> list[Config]:
    """What is worth measuring for these sizes; the heuristic comes first."""
    first = heuristic(weights, block_rows)
    others = [
        Config(n, k, 1, warps, stages)
        for n in (64, 128)
        for k in (32, 64, 128)
        for warps in ((4, 8) if block_rows >= 64 else (4,))
        for stages in (3, 4)
        if n <= max(first.block_n, 64) and stages * k * (block_rows + n) * weights.dtype.itemsize < 220_000
    ]
    return [first, *(config for config in others if config != first)]


def grouped_matmul(
    x: Array,
    weights: Array,
    plan: GroupPlan,
    *,
    rows_per_token: int,
    out_dtype: DTypeLike,
    backend: Backend,
    config: Config | None = None,
    name: str = OP,
) -> Array:
    """[M, N] in `out_dtype`; arguments as in api.py. config: instead of the one chosen, to measure it."""
    num_rows, num_outputs = plan.group_of_row.shape[0], weights.shape[2]
    num_blocks, block_rows = plan.block_rows.shape
    if config is None:
        key = config_key(weights, block_rows)
        config = tuning.choose(OP, backend.device, key, heuristic(weights, block_rows))
    split = config.num_splits > 1
    shares = triton_call(
        functools.partial(_kernel, config=config, rows_per_token=rows_per_token),
        name=name,
        grid=(num_blocks, pl.cdiv(num_outputs, config.block_n), config.num_splits),
        out_shape=jax.ShapeDtypeStruct((config.num_splits, num_rows, num_outputs), jnp.float32 if split else out_dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=backend.interpret,
    )(x, weights, plan.block_group, plan.block_rows)
    return shares.sum(axis=0).astype(out_dtype) if split else shares[0]


def _kernel(
    x: Any, weights: Any, block_group: Any, block_rows: Any, out: Any, *, config: Config, rows_per_token: int
) -> None:
    """out: [num_splits, M, N]."""
    num_groups, num_inputs, num_outputs = weights.shape
    number_of_block, tile, share_number = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    group = load(block_group.at[number_of_block])

    @pl.when(group >= 0)
    def _() -> None:
        rows = load(block_rows.at[number_of_block, jnp.arange(block_rows.shape[1])])
        sources = jnp.minimum(rows, out.shape[1] - 1) // rows_per_token
        columns = tile * config.block_n + jnp.arange(config.block_n)
        lane = jnp.arange(config.block_k)

        def block(number: Array, total: Array) -> Array:
            k = number * config.block_k + lane
            left = load(x.at[sources[:, None], k[None, :]], mask=(k < num_inputs)[None, :], other=0.0)
            inside = (k < num_inputs)[:, None] & (columns < num_outputs)[None, :]
            right = load(weights.at[group, k[:, None], columns[None, :]], mask=inside, other=0.0)
            return total + dot(left, right, allow_tf32=False)

        num_blocks = pl.cdiv(num_inputs, config.block_k)
        share = pl.cdiv(num_blocks, config.num_splits)
        first = share_number * share
        end = jnp.where(group < num_groups, jnp.minimum(first + share, num_blocks), first)
        init = jnp.zeros((rows.shape[0], config.block_n), jnp.float32)
        total = lax.fori_loop(first, end, block, init)
        mask = (rows < out.shape[1])[:, None] & (columns < num_outputs)[None, :]
        store(out.at[share_number, rows[:, None], columns[None, :]], total.astype(out.dtype), mask=mask)
