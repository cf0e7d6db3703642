"""Time on the device: programs that are long enough, called often enough, that launching them does not count.

A program makes several calls of a kernel, each needing the one before, over data several times larger than the L2
cache. A sample is some runs of the program queued at once and waited for once; figures are over the samples.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int
    calls: int  # in a sample


def compiled(
    function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()
) -> tuple[Callable[..., Any], float]:
    """The program for these arguments, and the seconds it took to trace and compile."""
    start = time.perf_counter()
    program = jax.jit(function, donate_argnums=donate).lower(*args).compile()
    return program, round(time.perf_counter() - start, 3)


def measure(
    run: Callable[[Any], Any], state: Any, *, calls: int, samples: int, sample_seconds: float
) -> tuple[Timing, Any]:
    """Times `state = run(state)`, which makes `calls` calls; returns the timing and the last state.

    sample_seconds: what a sample takes at least; it sets how many runs are queued for one.
    """
    taken = 0.0
    for _ in range(WARM_UP):
        start = time.perf_counter()
        state = jax.block_until_ready(run(state))
        taken = time.perf_counter() - start
    runs = max(1, round(sample_seconds / max(taken, 1e-6)))
    each = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(runs):
            state = run(state)
        jax.block_until_ready(state)
        each.append((time.perf_counter() - start) / (runs * calls) * 1e6)
    median, p10, p90 = (round(float(np.percentile(each, share)), 3) for share in (50, 10, 90))
    return Timing(median, p10, p90, samples, runs * calls), state


def tied(x: Array, result: Array) -> Array:
    """x, unchanged, but not known before `result` is: what keeps one call behind another."""
    return x + (0 * result.reshape(-1)[0]).astype(x.dtype)


def errors(found: Any, truth: Any) -> dict[str, float]:
    """How far a result is off, over all its arrays.

    max_abs_error: the largest difference. rel_error: the norm of the differences over the norm of the truth; of
    integers, the share that differs.
    """
    largest = wrong = size = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        if not b.size:
            continue
        if jnp.issubdtype(b.dtype, jnp.integer):
            differs = float(jnp.sum(a != b))
            largest, wrong, size = max(largest, differs), wrong + differs, size + b.size
            continue
        off = a.astype(jnp.float32) - b.astype(jnp.float32)
        largest = float(np.maximum(largest, jnp.max(jnp.abs(off))))  # a NaN stays
        wrong += float(jnp.sum(jnp.square(off)))
        size += float(jnp.sum(jnp.square(b.astype(jnp.float32))))
    share = wrong / size if size else wrong
    integers = all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(truth))
    return {"max_abs_error": largest, "rel_error": share if integers else share**0.5}
