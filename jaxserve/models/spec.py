"""One description per parameter, from which everything else about it follows.

In: a tree with `ParamSpec` leaves (`params.decoder_spec`). Out: shapes, random parameters, and the list of checkpoint
tensors that strict loading (`loading/weights.py`) checks and reads. Shardings will follow from `axes`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Placement: TypeAlias = jax.Device | jax.sharding.Sharding | None  # None = JAX's default device


@dataclass(frozen=True)
class Source:
    """One checkpoint tensor. It fills `fused[where]` of its parameter (row-major, reshaped to fit)."""

    name: str
    shape: tuple[int, ...]  # as the checkpoint has it; [out, in] for a projection
    where: tuple[int | slice, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter: `shape` and `axes` as the model sees it, `sources` as the checkpoint has it.

    With `transposed`, the fused array is laid out as checkpoints are, contracted axis last, and that axis then moves
    to the front. A parameter the model lacks has shape (0,) and no sources.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical name of each axis: what a sharding rule is keyed by
    sources: tuple[Source, ...] = ()
    transposed: bool = False
    contracted: int | None = None  # of a projection: its axis that activations contract; what quantisation narrows
    mean: float = 0.0  # of random parameters
    std: float = 0.0

    def __post_init__(self) -> None:
        assert len(self.axes) == len(self.shape), (self.axes, self.shape)

    @property
    def fused_shape(self) -> tuple[int, ...]:
        return self.shape[1:] + self.shape[:1] if self.transposed else self.shape


ABSENT = ParamSpec(shape=(0,), axes=(None,))


def sources(spec_tree: Any) -> dict[str, Source]:
    """Every checkpoint tensor the model is made of, by name."""
    return {source.name: source for spec in jax.tree.leaves(spec_tree) for source in spec.sources}


def shapes(spec_tree: Any, dtype: DTypeLike) -> Any:
    """The same tree with `jax.ShapeDtypeStruct` leaves; allocates nothing."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), spec_tree)


def random_params(
    spec_tree: Any,
    dtype: DTypeLike,
    seed: int,
    placement: Placement = None,
    finish: Callable[[ParamSpec, jax.Array], Any] = lambda _, param: param,
) -> Any:
    """The same tree with arrays drawn on the device itself: mean + std * normal, the same for the same seed.

    finish: makes of each parameter the leaf that is kept, before the next is drawn.
    """
    specs, structure = jax.tree.flatten(spec_tree)
    if isinstance(placement, jax.Device):
        placement = jax.sharding.SingleDeviceSharding(placement)
    draw = _draw_on(placement)
    leaves = [
        finish(
            spec, draw(np.uint32(seed % 2**32), np.uint32(number), spec.shape, spec.mean, spec.std, jnp.dtype(dtype))
        )
        for number, spec in enumerate(specs)
    ]
    return jax.tree.unflatten(structure, leaves)


@functools.cache
def _draw_on(sharding: jax.sharding.Sharding | None) -> Any:
    """One program per distinct shape, not one for the whole tree: layers repeat, and compiling dominates the time."""
    return jax.jit(_draw, static_argnums=(2, 3, 4, 5), out_shardings=sharding)


def _draw(
    seed: jax.Array, number: jax.Array, shape: tuple[int, ...], mean: float, std: float, dtype: DTypeLike
) -> jax.Array:
    if std == 0.0:
        return jnp.full(shape, mean, dtype)
    key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), number)  # compiles and runs faster than threefry
    return (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
