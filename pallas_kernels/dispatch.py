"""Chooses a backend for every op once, at start-up, and logs the choice. Nothing changes backend later."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.kv_update import api as kv_update
from pallas_kernels.paged_attention import api as paged_attention
from pallas_kernels.paged_attention.shape import AttentionShape
from pallas_kernels.sampling import api as sampling_api
from pallas_kernels.storage import FLOAT8

FLOAT8_NAME = jnp.dtype(FLOAT8).name

logger = logging.getLogger(__name__)

# Compute capabilities that Triton asks for: tensor-core code of bfloat16, conversions of float8
OLDEST_TRITON, OLDEST_FLOAT8 = (8, 0), (8, 9)
HOPPER = 9  # whose wgmma no other generation has


class BackendError(ValueError):
    """A backend was asked for that cannot run here; the message says why."""


@dataclass(frozen=True)
class Target:
    """What the kernels will run on."""

    platform: str  # "cpu" or "gpu"
    kind: str = ""  # as JAX names it: "NVIDIA H200"
    compute_capability: tuple[int, int] = (0, 0)
    num_cores: int = 0  # streaming multiprocessors


@dataclass(frozen=True)
class Kernels:
    """The ops a model calls, each already bound to its backend."""

    prepare_attention: Callable[..., Any]
    attend: Callable[..., Any]
    update_kv: Callable[..., Any]
    sample: Callable[..., Any]
    matmul: Backend  # of products with quantised weights, where it can run them
    backends: tuple[tuple[str, str], ...]  # (op, backend), for logs and reports


def choose(
    target: Target, shape: AttentionShape, *, attention: str = "auto", sampling: str = "auto", matmul: str = "auto"
) -> Kernels:
    """The ops for a device and a pool. attention: auto, reference, triton or mosaic; for what writes the pool too.

    auto: Triton where it compiles, plain JAX elsewhere. On CPU a kernel that is asked for runs interpreted.
    sampling, matmul: auto, reference or triton. Raises BackendError for a backend that cannot run this on this device.
    """
    backend = _backend(target, "attention", attention, functools.partial(_attention_refused, target, shape))
    writer = REFERENCE if backend.name == "reference" else Backend("triton", *_device(target))
    sampler = _backend(target, "sampling", sampling, sampling_api.unsupported)
    multiplier = _backend(target, "matmul", matmul, lambda backend: "")
    kernels = Kernels(
        prepare_attention=functools.partial(paged_attention.prepare_attention, shape=shape, backend=backend),
        attend=functools.partial(paged_attention.attend, backend=backend),
        update_kv=functools.partial(kv_update.update_kv, backend=writer),
        sample=functools.partial(sampling_api.sample, backend=sampler),
        matmul=multiplier,
        backends=(
            ("paged_attention", backend.name),
            ("kv_update", writer.name),
            ("sampling", sampler.name),
            ("quant_matmul", multiplier.name),
        ),
    )
    where = target.kind or target.platform
    interpreted = ""
    if any(chosen.interpret for chosen in (backend, sampler, multiplier)):
        interpreted = " (kernels interpreted, for tests)"
    logger.info("kernels on %s: %s%s", where, ", ".join("=".join(pair) for pair in kernels.backends), interpreted)
    return kernels


def _device(target: Target) -> tuple[str, int, bool]:
    """Backend's fields after its name."""
    return target.kind, target.num_cores, target.platform == "cpu"


def _attention_refused(target: Target, shape: AttentionShape, backend: Backend) -> str:
    if target.platform == "gpu" and shape.kv_dtype == FLOAT8_NAME and target.compute_capability < OLDEST_FLOAT8:
        return f"{target.kind} converts no float8: compute capability 8.9 is needed"
    if target.platform == "gpu" and backend.name == "mosaic" and target.compute_capability[0] != HOPPER:
        return f"{target.kind} is no Hopper GPU"
    return paged_attention.unsupported(backend, shape)


def _backend(target: Target, op: str, wanted: str, refused: Callable[[Backend], str]) -> Backend:
    """The backend that runs `op`. refused: why one cannot, "" if it can."""
    compiles = target.platform == "gpu" and target.compute_capability >= OLDEST_TRITON
    if wanted == "reference" or (wanted == "auto" and target.platform == "cpu"):
        return REFERENCE
    backend = Backend("triton" if wanted == "auto" else wanted, *_device(target))
    reason = refused(backend)
    if target.platform == "gpu" and not compiles:
        reason = f"{target.kind} has compute capability {'.'.join(map(str, target.compute_capability))}, 8.0 is needed"
    if not reason:
        return backend
    if wanted != "auto":
        raise BackendError(f"{op}_backend={wanted} cannot run here: {reason}")
    logger.warning("%s runs as plain JAX, because Triton cannot run it: %s", op, reason)
    return REFERENCE
