"""One kernel at one shape: what `kernels.py` times, checks and tunes. The cases are made in *_cases.py."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax import Array

from gpu.roofline import Work
from pallas_kernels import tuning
from pallas_kernels.backend import Backend

WORKING_SET = 512 << 20  # several times any L2
MOST_CALLS = 16
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}  # of results in this dtype


@dataclass(frozen=True)
class Problem:
    """A case with its data on the device. Call i of a chain reads copy i of what is large, so that none is in the L2.

    calls       kernel calls in a chain
    work        of one call
    data        arrays that only are read
    state       makes what goes through a chain, and on through the next one; given away to it if `donated`
    chain       (backend, state, data) -> state, traced
    result      (backend, data) -> what one call gives, traced
    truth       (data) -> the same in float32, by the reference, traced
    """

    calls: int
    work: Work
    data: Any
    state: Callable[[], Any]
    chain: Callable[[Backend, Any, Any], Any]
    result: Callable[[Backend, Any], Any]
    truth: Callable[[Any], Any]
    donated: bool = False


@dataclass(frozen=True)
class Case:
    """op and name say which; sizes and dtype are for the reader of a row.

    tolerance    largest error, as a share of the result's norm
    unsupported  why a backend cannot run it; "" if it can
    candidates   configurations a tuner should try on a backend
    tune         whether a tuner should come by: not for shapes that tell rather than occur
    """

    op: str
    name: str
    sizes: Mapping[str, Any]
    dtype: str
    tolerance: float
    backends: tuple[str, ...]
    build: Callable[[], Problem]
    unsupported: Callable[[Backend], str]
    candidates: Callable[[Backend], list[Any]]
    tune: bool = True


@dataclass(frozen=True)
class Choice:
    """A configuration that an op looked up while it was traced."""

    op: str
    key: dict[str, int | str]
    config: Any


@contextmanager
def choices(wanted: Any = None) -> Iterator[list[Choice]]:
    """Gathers what ops look up in here. wanted: a configuration they shall get in place of their own of its type."""
    made: list[Choice] = []
    choose = tuning.choose

    def choose_and_tell(op: str, device: str, key: Mapping[str, int | str], heuristic: Any) -> Any:
        config = wanted if type(wanted) is type(heuristic) else choose(op, device, key, heuristic)
        made.append(Choice(op, dict(key), config))
        return config

    with mock.patch.object(tuning, "choose", choose_and_tell):
        yield made


def chain_length(bytes_each: int) -> int:
    """Calls of a chain, each over so many bytes of its own; two on a CPU, where nothing is measured."""
    if jax.default_backend() == "cpu":
        return 2
    return min(MOST_CALLS, max(2, -(-WORKING_SET // bytes_each)))


def noise(seed: int, shape: tuple[int, ...], dtype: Any) -> Array:
    """Standard normal numbers, made on the device."""
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, dtype)


def ids(array: Any) -> Array:
    """i32 on the device."""
    return jax.device_put(np.asarray(array, np.int32))
