"""Compiles every program the engine will ever run, before the first request.

Tracing holds the interpreter lock, compiling does not: the ladder is compiled in parallel threads. JAX's persistent
compilation cache makes a second start load what the first one compiled.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxserve.config import CompileOptions
from jaxserve.loading.progress import Progress
from jaxserve.loading.weights import param_shapes
from jaxserve.runner import step
from jaxserve.runner.dimensions import Dimensions
from jaxserve.runner.layout import packed_size
from jaxserve.shapes import StepShape

MAX_COMPILE_THREADS = 8


@dataclass(frozen=True)
class Executables:
    """Compiled programs; calling one never traces."""

    steps: dict[StepShape, Any]
    write_page_row: Any
    write_logit_row: Any


def enable_compilation_cache(options: CompileOptions) -> Path:
    """Points JAX's persistent cache at the configured directory, for programs of any size; returns the directory."""
    directory = options.cache_dir
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


def step_arguments(dimensions: Dimensions, shape: StepShape) -> tuple[Any, ...]:
    """The shapes a step of `shape` is called with: params, kv, slots, packed, bitmask."""
    return (
        param_shapes(dimensions.model, dimensions.dtype, dimensions.quantisation),
        dimensions.kv_shapes(),
        dimensions.slot_shapes(),
        jax.ShapeDtypeStruct((packed_size(shape, dimensions.page_size),), np.int32),
        jax.ShapeDtypeStruct((shape.sampling_rows, dimensions.bitmask_words), np.uint32),
    )


def trace_step(dimensions: Dimensions, shape: StepShape, arguments: tuple[Any, ...] = ()) -> Any:
    """Traces the step of one shape; kv and slots are donated. Needs no device of the platform it is meant for.

    arguments: `step_arguments` placed somewhere; () = on the default device.
    """
    function = jax.jit(step.StepProgram(dimensions, shape).__call__, donate_argnums=(1, 2))
    return function.trace(*(arguments or step_arguments(dimensions, shape)))


def compile_step(dimensions: Dimensions, shape: StepShape) -> Any:
    """The compiled step of one shape. Allocates nothing on the device."""
    return trace_step(dimensions, shape).lower().compile()


def compile_all(
    dimensions: Dimensions,
    ladder: Sequence[StepShape],
    *,
    threads: int | None,
    progress: Progress,  # of programs compiled
    ready: dict[StepShape, Any] | None = None,
) -> Executables:
    """Compiles the ladder (less what is `ready`) and the slot writers."""
    steps = dict(ready or {})
    missing = [shape for shape in ladder if shape not in steps]
    progress(len(steps), len(ladder))
    workers = threads or min(os.cpu_count() or 1, MAX_COMPILE_THREADS)
    with ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool:
        # Largest first: the last to finish is then a small one.
        futures = {pool.submit(compile_step, dimensions, shape): shape for shape in reversed(missing)}
        for future in as_completed(futures):
            steps[futures[future]] = future.result()
            progress(len(steps), len(ladder))
    slots = dimensions.slot_shapes()
    index = jax.ShapeDtypeStruct((), np.int32)
    pages = jax.ShapeDtypeStruct((dimensions.pages_per_slot,), np.int32)
    counts, bias = (jax.ShapeDtypeStruct((dimensions.model.vocab_size,), d) for d in (np.int32, np.float32))
    return Executables(
        steps=steps,
        write_page_row=jax.jit(step.write_page_row, donate_argnums=0).lower(slots, index, pages).compile(),
        write_logit_row=jax.jit(step.write_logit_row, donate_argnums=0).lower(slots, index, counts, bias).compile(),
    )
