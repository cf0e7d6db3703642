"""Quantised weights: a float weight goes in, `QuantWeight` comes out, and the other way round.

    scheme        values                 scale             minimum          element
    int8          int8[N, K]             f32[N]            f32[0]           q * scale, symmetric
    fp8           float8_e4m3fn[N, K]    f32[N]            f32[0]           q * scale
    fp8_dynamic   as fp8; the activations become float8 too, with a scale for every token
    int4          uint8[N, K/2]          f16[K/group, N]   f16[K/group, N]  q * scale + minimum, q in 0..15

K is the contracted axis, N the outputs. The contracted axis is last, as in checkpoints: a tensor core takes 8-bit
operands that way round without shuffling single bytes.

Order of nibbles in int4: every group of `group` inputs of an output is packed by itself, its first half into the low
nibbles and its second half into the high ones. Input `g * group + i` with i < group/2 is the low nibble of byte
`g * group/2 + i`, and input `g * group + group/2 + i` the high nibble of the same byte. For groups of 32 that is
GGUF's Q4_0 and Q4_1, byte by byte. So a run of bytes unpacks to two dense runs, each of which a kernel multiplies by
the activations it belongs to; nibbles are never interleaved. Scales are float16, as in GGUF, AWQ and GPTQ: float32 ones
would make groups of 32 a third larger.
"""

from typing import Generic, TypeVar

import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.storage import FLOAT8, FLOAT8_MAX

Leaf = TypeVar("Leaf")  # Array; jax.ShapeDtypeStruct where programs are compiled without data

SCHEMES = ("int8", "fp8", "fp8_dynamic", "int4")
GROUP = 64  # inputs that share a scale in int4 unless asked otherwise: divides the widths of nearly every model
LEAST_GROUP = 32  # half of it is the shortest contraction of a tensor core
INT8_MAX = 127
INT4_MAX = 15


@struct.dataclass
class QuantWeight(Generic[Leaf]):
    """A weight in few bits; the table above says what each field holds."""

    values: Leaf
    scale: Leaf
    minimum: Leaf
    scheme: str = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)  # inputs that share a scale: K unless int4
    shape: tuple[int, ...] = struct.field(pytree_node=False)  # as the model sees it: [K, ...], the other axes are N
    # Chosen at start-up with the weight's shape in view, and carried by it, so that who multiplies need not know.
    backend: Backend = struct.field(pytree_node=False, default=REFERENCE)

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.shape[0]

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.values.shape[0]  # type: ignore[attr-defined]


def quantise(weight: Array, scheme: str, group: int = GROUP) -> QuantWeight[Array]:
    """The nearest `scheme` has to a float weight [K, ...]; axes after the first are flattened to N.

    group: inputs that share a scale, for int4: a power of two of at least 32 that divides K.
    Error of an element: int8 at most 1/254 of the largest of its column; fp8 1/16 of the element or 2^-10 / 448 of the
    largest; int4 half a step of (max - min)/15 of its group, and what rounding scale and minimum to float16 adds.
    Raises ValueError for an unknown scheme or a group that does not fit.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r}: must be one of {', '.join(SCHEMES)}")
    num_inputs = weight.shape[0]
    wide = weight.reshape(num_inputs, -1).astype(jnp.float32).T
    if scheme == "int4":
        if group < LEAST_GROUP or group & (group - 1) or num_inputs % group:
            raise ValueError(f"group {group}: must be a power of two, at least {LEAST_GROUP}, and divide {num_inputs}")
        values, scale, minimum = _quantise_groups(wide, group)
    else:
        group = num_inputs
        values, scale = _quantise_outputs(wide, scheme)
        minimum = jnp.zeros((0,), jnp.float32)
    return QuantWeight(values, scale, minimum, scheme=scheme, group=group, shape=weight.shape)


def dequantise(weight: QuantWeight[Array], dtype: DTypeLike) -> Array:
    """The weight in `dtype` and in its own shape, computed in float32."""
    if weight.scheme == "int4":
        q = unpack(weight.values, weight.group).astype(jnp.float32).reshape(weight.num_outputs, -1, weight.group)
        scale, minimum = (part.astype(jnp.float32).T[..., None] for part in (weight.scale, weight.minimum))
        wide = (q * scale + minimum).reshape(weight.num_outputs, -1)
    else:
        wide = weight.values.astype(jnp.float32) * weight.scale[:, None]
    return wide.astype(dtype).T.reshape(weight.shape)


def pack(q: Array, group: int) -> Array:
    """uint8[N, K/2] of numbers 0..15 [N, K], two to a byte in the order that this module describes."""
    num_outputs, num_inputs = q.shape
    halves = q.astype(jnp.uint8).reshape(num_outputs, num_inputs // group, 2, group // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(num_outputs, num_inputs // 2)


def unpack(packed: Array, group: int) -> Array:
    """uint8[N, K] of numbers 0..15: undoes `pack`."""
    halves = packed.reshape(packed.shape[0], -1, 1, group // 2)
    return jnp.concatenate([halves & 15, halves >> 4], axis=2).reshape(packed.shape[0], -1)


def _quantise_outputs(wide: Array, scheme: str) -> tuple[Array, Array]:
    """(values [N, K], scale f32[N]) so that the largest of an output is the largest its dtype has."""
    largest = INT8_MAX if scheme == "int8" else FLOAT8_MAX
    peak = jnp.max(jnp.abs(wide), axis=1)
    scale = jnp.where(peak > 0, peak / largest, 1.0)
    scaled = jnp.clip(wide / scale[:, None], -largest, largest)
    return jnp.round(scaled).astype(jnp.int8) if scheme == "int8" else scaled.astype(FLOAT8), scale


def _quantise_groups(wide: Array, group: int) -> tuple[Array, Array, Array]:
    """(packed uint8[N, K/2], scale f16[K/group, N], minimum f16[K/group, N])."""
    groups = wide.reshape(wide.shape[0], -1, group)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    minimum, scale = low.astype(jnp.float16), ((high - low) / INT4_MAX).astype(jnp.float16)
    # The rounded scale is what q will be multiplied by, so it is what the element is divided by.
    divisor = jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None]
    q = jnp.clip(jnp.round((groups - minimum.astype(jnp.float32)[..., None]) / divisor), 0, INT4_MAX)
    return pack(q.reshape(wide.shape), group), scale.T, minimum.T
