"""What `--quantization` means: a projection goes in, the leaf that the model multiplies by comes out.

    none    the parameter itself
    int8    8 bits, a scale for every output          half the bytes of bfloat16
    fp8     float8_e4m3fn, a scale for every output   half
    int4    4 bits, a scale and a minimum for every group of inputs of an output   a bit more than a quarter

Only projections are narrowed: their bytes are what a decode step waits for. Embeddings and norms stay as they are, and
so does a head that is the embedding. Activations keep their dtype (W8A16, W4A16).
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.errors import ConfigError
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.quant_matmul import api as quant_matmul
from pallas_kernels.quant_matmul.weight import GROUP, LEAST_GROUP, quantise

logger = logging.getLogger(__name__)

SCHEMES = ("none", "int8", "fp8", "int4")


@dataclass(frozen=True)
class Quantisation:
    """scheme: of SCHEMES. group: inputs that share a scale in int4, at most. backend: what multiplies where it can.

    required: that backend was asked for by name, so a weight it cannot take is refused.
    """

    scheme: str = "none"
    group: int = GROUP
    backend: Backend = REFERENCE
    required: bool = False


UNQUANTISED = Quantisation()


def narrow(param: Array, contracted: int, quantisation: Quantisation) -> Any:
    """The leaf that serves for a projection: itself, or a `QuantWeight` with the axis `contracted` first.

    Raises ConfigError where no group of int4 divides that axis, or the required backend cannot take the weight.
    """
    return param if quantisation.scheme == "none" else _narrowed(param, contracted, quantisation)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _narrowed(param: Array, contracted: int, quantisation: Quantisation) -> Any:
    """A program per shape: the layers share it."""
    matrix = jnp.moveaxis(param, contracted, 0)
    group = _group(matrix.shape[0], quantisation.group) if quantisation.scheme == "int4" else quantisation.group
    weight = quantise(matrix, quantisation.scheme, group)
    reason = quant_matmul.unsupported(quantisation.backend, weight, param.dtype)
    name = quantisation.backend.name
    if reason and quantisation.required:
        raise ConfigError(f"matmul_backend={name} cannot multiply by a weight of {weight.shape}: {reason}")
    if reason:
        logger.warning("%s weight %s runs as plain JAX: %s: %s", quantisation.scheme, weight.shape, name, reason)
    return weight.replace(backend=REFERENCE if reason else quantisation.backend)  # type: ignore[attr-defined]


def _group(num_inputs: int, longest: int) -> int:
    """The longest group up to `longest` that divides the inputs."""
    group = longest
    while group > LEAST_GROUP and num_inputs % group:
        group //= 2
    if num_inputs % group:
        raise ConfigError(f"quantization=int4: {num_inputs} inputs of a projection are no multiple of {LEAST_GROUP}")
    return group
