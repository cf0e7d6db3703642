"""Pallas-Triton product with a quantised weight: one program for a tile of the output and a share of the contraction.

A program walks its share in blocks: weights come in with 128-bit asynchronous copies, are widened in registers and go
to the tensor cores. In a decode step x has few rows, so that tiles alone would not fill the device: the contraction is
split, and the shares are summed afterwards in a fixed order (no atomics: the same input gives the same output).
Indices past the last row or output are clamped, and what they compute is not stored.
"""

import functools
from collections.abc import Callable
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
from pallas_kernels.quant_matmul.weight import LEAST_GROUP, QuantWeight

OP = "quant_matmul"
LONGEST_BLOCK = 128  # of the contraction
MAX_SPLITS = 16
HAZARD = (2**31, 2**32)  # arrays of so many bytes get 32-bit offsets that overflow


@dataclass(frozen=True)
class Config:
    """A tile of block_m rows by block_n outputs, block_k inputs at a time, the contraction in num_splits shares."""

    block_m: int
    block_n: int
    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int


def unsupported(weight: QuantWeight[Any], dtype: DTypeLike) -> str:
    """Why these kernels cannot multiply x of `dtype` by this weight; "" if they can."""
    if weight.scheme == "fp8_dynamic":
        return "Triton computes products of float8 in float16; XLA has cuBLASLt compute them in float8"
    if weight.num_inputs % LEAST_GROUP:
        return f"{weight.num_inputs} inputs are no multiple of {LEAST_GROUP}"
    longest = LONGEST_BLOCK if jnp.dtype(dtype).itemsize < 4 else LONGEST_BLOCK // 2  # or registers would spill
    if weight.scheme == "int4" and weight.group > longest:
        return f"groups of {weight.group} inputs are longer than the {longest} of {jnp.dtype(dtype).name}"
    if HAZARD[0] < weight.values.size <= HAZARD[1]:
        return f"a weight of {weight.values.size} bytes overflows Triton's offsets"
    return ""


def config_key(num_tokens: int, weight: QuantWeight[Any], dtype: DTypeLike) -> dict[str, int | str]:
    """What a configuration is looked up by."""
    return {
        "tokens": pl.next_power_of_2(num_tokens),
        "inputs": weight.num_inputs,
        "outputs": weight.num_outputs,
        "scheme": weight.scheme,
        "group": weight.group,
        "dtype": jnp.dtype(dtype).name,
    }


def heuristic(num_tokens: int, weight: QuantWeight[Any], dtype: DTypeLike, num_cores: int) -> Config:
    """A configuration for sizes that nobody measured: registers and shared memory known to suffice."""
    longest = _longest_block(weight)
    if jnp.dtype(dtype).itemsize == 4:
        block_k = weight.group if weight.scheme == "int4" else 32
        splits = _splits(num_tokens, 16, 32, block_k, weight, num_cores)
        return Config(block_m=16, block_n=32, block_k=block_k, num_splits=splits, num_warps=4, num_stages=2)
    if num_tokens >= 128 and not (weight.scheme == "int4" and weight.group > 64):
        return Config(block_m=128, block_n=128, block_k=min(longest, 64), num_splits=1, num_warps=8, num_stages=4)
    if num_tokens >= 64:
        block_n = 64 if weight.scheme == "int4" else 128
        return Config(block_m=64, block_n=block_n, block_k=longest, num_splits=1, num_warps=4, num_stages=3)
    block_m = 32 if num_tokens > 16 else 16
    splits = _splits(num_tokens, block_m, 64, longest, weight, num_cores)
    return Config(block_m=block_m, block_n=64, block_k=longest, num_splits=splits, num_warps=4, num_stages=4)


def candidates(num_tokens: int, weight: QuantWeight[Any], dtype: DTypeLike, num_cores: int) -> list[Config]:
    """What is worth measuring for these sizes; the heuristic comes first."""
    first = heuristic(num_tokens, weight, dtype, num_cores)
    longest = _longest_block(weight)
    least = weight.group if weight.scheme == "int4" else LEAST_GROUP
    lengths = [k for k in (64, 128) if least <= k <= longest] or [longest]
    if num_tokens >= 64:
        tiles = [(64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 128, 8)]
        others = [Config(m, n, k, 1, warps, stages) for m, n, warps in tiles for k in lengths for stages in (3, 4)]
    else:
        tiles = [(first.block_m, n, warps) for n, warps in ((32, 4), (64, 4), (128, 8))]
        others = [
            Config(m, n, k, splits, warps, num_stages=4)
            for m, n, warps in tiles
            for k in lengths
            for splits in (1, 2, 4, 8)
        ]
    return [first, *(config for config in others if config != first)]


def quant_matmul(
    x: Array, weight: QuantWeight[Array], *, out_dtype: DTypeLike, backend: Backend, config: Config | None = None
) -> Array:
    """[T, N] in `out_dtype`; arguments as in api.py. config: instead of the one chosen, to measure it."""
    num_tokens = x.shape[0]
    if config is None:
        key = config_key(num_tokens, weight, x.dtype)
        config = tuning.choose(OP, backend.device, key, heuristic(num_tokens, weight, x.dtype, backend.num_cores))
    split = config.num_splits > 1
    scales = (weight.scale, weight.minimum) if weight.scheme == "int4" else (weight.scale,)
    body = functools.partial(_int4_kernel, group=weight.group) if weight.scheme == "int4" else _int8_kernel
    shares = triton_call(
        functools.partial(body, config=config),
        name=f"{OP}_{weight.scheme}",
        grid=(pl.cdiv(num_tokens, config.block_m), pl.cdiv(weight.num_outputs, config.block_n), config.num_splits),
        out_shape=jax.ShapeDtypeStruct(
            (config.num_splits, num_tokens, weight.num_outputs), jnp.float32 if split else out_dtype
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=backend.interpret,
    )(x, weight.values, *scales)
    return shares.sum(axis=0).astype(out_dtype) if split else shares[0]


def _int8_kernel(x: Any, values: Any, scale: Any, out: Any, *, config: Config) -> None:
    """values: int8 or float8[N, K]; scale: f32[N]; out: [num_splits, T, N]."""
    rows, columns = _tile(out, config)
    lane = jnp.arange(config.block_k)

    def block(number: Array, total: Array) -> Array:
        k = number * config.block_k + lane
        left = load(x.at[rows[:, None], k[None, :]])
        right = load(values.at[columns[:, None], k[None, :]])
        if right.dtype != jnp.int8:
            # Every float8 is a float16; straight to bfloat16, the conversion runs at a quarter of the speed.
            right = right.astype(jnp.float16).astype(jnp.float32)
        return total + _dot(left, right.astype(left.dtype))

    _store(out, _walk(x.shape[1], block, config) * load(scale.at[columns])[None, :], config)


def _int4_kernel(x: Any, values: Any, scale: Any, minimum: Any, out: Any, *, config: Config, group: int) -> None:
    """values: uint8[N, K/2]; scale, minimum: f16[K/group, N]. The two halves of the groups are multiplied apart."""
    rows, columns = _tile(out, config)
    half, num_groups, num_bytes = group // 2, config.block_k // group, config.block_k // 2
    lane, group_lane = jnp.arange(num_bytes), jnp.arange(num_groups)
    low_lane = lane // half * group + lane % half  # where in the block the inputs of the low nibbles are

    def block(number: Array, total: Array) -> Array:
        k = number * config.block_k + low_lane
        low_left = load(x.at[rows[:, None], k[None, :]])
        high_left = load(x.at[rows[:, None], (k + half)[None, :]])
        packed = load(values.at[columns[:, None], (number * num_bytes + lane)[None, :]])
        groups = number * num_groups + group_lane
        step = load(scale.at[groups[:, None], columns[None, :]]).astype(jnp.float32)
        start = load(minimum.at[groups[:, None], columns[None, :]]).astype(jnp.float32)
        bits = packed.astype(jnp.int32).reshape(config.block_n, num_groups, half)

        def widened(nibble: Array) -> Array:
            # The bits of the float32 128 + q: no conversion from integer, which runs at a quarter of the speed.
            shifted = lax.bitcast_convert_type(nibble | 0x43000000, jnp.float32)
            wide = shifted * step.T[:, :, None] + (start - 128 * step).T[:, :, None]
            return wide.reshape(config.block_n, num_bytes).astype(x.dtype)

        low, high = widened((bits & 0x0F) << 16), widened((bits & 0xF0) << 12)
        return total + (_dot(low_left, low) + _dot(high_left, high))

    _store(out, _walk(x.shape[1], block, config), config)


def _tile(out: Any, config: Config) -> tuple[Array, Array]:
    """(rows, outputs) of this program, those past the end clamped to the last."""
    rows = jnp.minimum(_lanes(0, config.block_m), out.shape[1] - 1)
    columns = _lanes(1, config.block_n)
    # Clamped indices are no longer known to be consecutive, so that scales would be loaded one by one.
    return rows, columns if out.shape[2] % config.block_n == 0 else jnp.minimum(columns, out.shape[2] - 1)


def _lanes(axis: int, size: int) -> Array:
    return pl.program_id(axis) * size + jnp.arange(size)


def _walk(num_inputs: int, block: Callable[[Array, Array], Array], config: Config) -> Array:
    """f32[block_m, block_n]: `block(number, total)` over this program's share of the contraction."""
    num_blocks = num_inputs // config.block_k
    share = pl.cdiv(num_blocks, config.num_splits)
    first = pl.program_id(2) * share
    init = jnp.zeros((config.block_m, config.block_n), jnp.float32)
    return lax.fori_loop(first, jnp.minimum(first + share, num_blocks), block, init)


def _store(out: Any, total: Array, config: Config) -> None:
    rows, columns = _lanes(0, config.block_m)[:, None], _lanes(1, config.block_n)[None, :]
    mask = (rows < out.shape[1]) & (columns < out.shape[2])
    store(out.at[pl.program_id(2), rows, columns], total.astype(out.dtype), mask=mask)


def _dot(left: Array, right: Array) -> Array:
    return dot(left, right, trans_b=True, allow_tf32=False)


def _longest_block(weight: QuantWeight[Any]) -> int:
    """The longest block of the contraction: a power of two that divides it; one group of int4 at least."""
    longest = min(weight.num_inputs & -weight.num_inputs, LONGEST_BLOCK)
    return max(longest, weight.group) if weight.scheme == "int4" else longest


def _splits(num_tokens: int, block_m: int, block_n: int, block_k: int, weight: QuantWeight[Any], num_cores: int) -> int:
    """Shares that give every core two programs, each of at least four blocks."""
    programs = pl.cdiv(num_tokens, block_m) * pl.cdiv(weight.num_outputs, block_n)
    most = min(MAX_SPLITS, weight.num_inputs // block_k // 4)
    splits = 1
    while splits * 2 <= most and programs * splits < 2 * num_cores:
        splits *= 2
    return splits
