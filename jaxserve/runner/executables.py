"""Compiles every program the engine will ever run, before the first request.

Tracing holds the interpreter lock, compiling does not: the ladder is compiled in parallel threads. JAX's persistent
compilation cache makes a second start load what the first one compiled.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.batch import KVPool, SlotState
from jaxserve.config import CompileOptions
from jaxserve.loading.weights import param_shapes
from jaxserve.models.config import ModelConfig
from jaxserve.runner import step
from jaxserve.runner.layout import packed_size
from jaxserve.shapes import StepShape
from pallas_kernels.dispatch import Kernels
from pallas_kernels.storage import storage_dtype

Progress = Callable[[int, int], None]  # (programs compiled, programs in all)
MAX_COMPILE_THREADS = 8


@dataclass(frozen=True)
class Dimensions:
    """Every size and choice the programs depend on, resolved: no "auto", no None."""

    model: ModelConfig
    kernels: Kernels
    dtype: str
    platform: str
    num_pages: int  # N, the waste page included
    page_size: int  # P
    max_num_seqs: int  # S
    max_model_len: int
    max_logprobs: int

    @property
    def pages_per_slot(self) -> int:
        """M."""
        return -(-self.max_model_len // self.page_size)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of all layers, keys and values."""
        model = self.model
        per_token = model.num_layers * 2 * model.num_kv_heads * model.head_dim
        return per_token * self.page_size * jnp.dtype(self.dtype).itemsize

    @property
    def bitmask_words(self) -> int:
        return -(-self.model.vocab_size // 32)

    def kv_shapes(self) -> KVPool[jax.ShapeDtypeStruct]:
        model = self.model
        pages = (model.num_layers * self.num_pages, self.page_size, model.num_kv_heads, model.head_dim)
        pool = jax.ShapeDtypeStruct(pages, storage_dtype(self.dtype, self.platform))
        return KVPool(k=pool, v=pool)

    def slot_shapes(self) -> SlotState[jax.ShapeDtypeStruct]:
        slots, vocab = self.max_num_seqs, self.model.vocab_size
        return SlotState(
            last_token=jax.ShapeDtypeStruct((slots,), jnp.int32),
            page_table=jax.ShapeDtypeStruct((slots, self.pages_per_slot), jnp.int32),
            token_counts=jax.ShapeDtypeStruct((slots, vocab), jnp.int32),
            logit_bias=jax.ShapeDtypeStruct((slots, vocab), jnp.float32),
        )

    def step_program(self, shape: StepShape) -> step.StepProgram:
        return step.StepProgram(
            model=self.model,
            kernels=self.kernels,
            shape=shape,
            page_size=self.page_size,
            max_model_len=self.max_model_len,
            max_logprobs=self.max_logprobs,
        )


@dataclass(frozen=True)
class Executables:
    """Compiled programs; calling one never traces."""

    steps: dict[StepShape, Any]
    write_page_row: Any
    write_logit_row: Any
    compile_seconds: float


def enable_compilation_cache(options: CompileOptions) -> Path:
    """Points JAX's persistent cache at the configured directory, for programs of any size; returns the directory."""
    directory = options.cache_dir
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


def trace_step(dimensions: Dimensions, shape: StepShape) -> Any:
    """Traces the step of one shape; kv and slots are donated. Needs no device of the platform it is meant for."""
    rows = shape.rows if shape.sampler == "full" else 0
    function = jax.jit(dimensions.step_program(shape).__call__, donate_argnums=(1, 2))
    return function.trace(
        param_shapes(dimensions.model, dimensions.dtype),
        dimensions.kv_shapes(),
        dimensions.slot_shapes(),
        jax.ShapeDtypeStruct((packed_size(shape, dimensions.page_size),), np.int32),
        jax.ShapeDtypeStruct((rows, dimensions.bitmask_words), np.uint32),
    )


def compile_step(dimensions: Dimensions, shape: StepShape) -> Any:
    """The compiled step of one shape. Allocates nothing on the device."""
    return trace_step(dimensions, shape).lower().compile()


def compile_all(
    dimensions: Dimensions,
    ladder: Sequence[StepShape],
    *,
    threads: int | None,
    progress: Progress,
    ready: dict[StepShape, Any] | None = None,
) -> Executables:
    """Compiles the ladder (less what is `ready`) and the slot writers."""
    start = time.perf_counter()
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
        compile_seconds=time.perf_counter() - start,
    )
