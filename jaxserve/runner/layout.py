"""One packed buffer per step: every small array travels to the device as a slice of a single i32 array.

`fields(shape, ...)` lists the fields in order; the host writes into views of one NumPy array, the step slices the same
offsets out of one device array. Floats travel as their bits.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxserve.batch import SamplingState, StepBatch
from jaxserve.shapes import StepShape


class Field(NamedTuple):
    name: str
    size: int
    dtype: Literal["i32", "u32", "f32"]


NUMPY_DTYPES = {"i32": np.int32, "u32": np.uint32, "f32": np.float32}
JAX_DTYPES = {"i32": jnp.int32, "u32": jnp.uint32, "f32": jnp.float32}

# Per-row sampling fields, in the order of SamplingState.
SAMPLING_FIELDS: tuple[tuple[str, Literal["i32", "u32", "f32"]], ...] = (
    ("temperature", "f32"),
    ("top_p", "f32"),
    ("min_p", "f32"),
    ("top_k", "i32"),
    ("seeds", "u32"),
    ("presence_penalty", "f32"),
    ("frequency_penalty", "f32"),
    ("repetition_penalty", "f32"),
    ("adjusts", "i32"),
    ("wants_logprobs", "i32"),
)


def fields(shape: StepShape, page_size: int) -> list[Field]:
    """Fields of the packed buffer of a step of `shape`, in order."""
    updates = shape.page_updates(page_size)
    return [
        Field("token_ids", shape.tokens, "i32"),
        Field("positions", shape.tokens, "i32"),
        Field("token_row", shape.tokens, "i32"),
        Field("query_start", shape.rows + 1, "i32"),
        Field("kv_lens", shape.rows, "i32"),
        Field("slots", shape.rows, "i32"),
        Field("samples", shape.rows, "i32"),
        Field("update_slot", updates, "i32"),
        Field("update_index", updates, "i32"),
        Field("update_page", updates, "i32"),
        *(Field(name, shape.sampling_rows, dtype) for name, dtype in SAMPLING_FIELDS),
        Field("prompt_targets", shape.prompt_targets, "i32"),
    ]


def packed_size(shape: StepShape, page_size: int) -> int:
    """Length of the packed buffer in i32 words."""
    return sum(field.size for field in fields(shape, page_size))


def host_views(shape: StepShape, page_size: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(i32 buffer, {field: view of its part}) to be filled in place."""
    buffer = np.zeros(packed_size(shape, page_size), np.int32)
    views = {}
    start = 0
    for field in fields(shape, page_size):
        views[field.name] = buffer[start : start + field.size].view(NUMPY_DTYPES[field.dtype])
        start += field.size
    return buffer, views


def unpack(packed: Array, shape: StepShape, page_size: int) -> tuple[StepBatch, SamplingState]:
    """The two pytrees of a step, sliced out of the packed i32 buffer (traced)."""
    values = {}
    start = 0
    for field in fields(shape, page_size):
        part = lax.slice_in_dim(packed, start, start + field.size)
        values[field.name] = part if field.dtype == "i32" else lax.bitcast_convert_type(part, JAX_DTYPES[field.dtype])
        start += field.size
    batch = StepBatch(**{name: values[name] for name in StepBatch.__dataclass_fields__})
    sampling = SamplingState(**{name: values[name] for name in SamplingState.__dataclass_fields__})
    return batch, sampling
