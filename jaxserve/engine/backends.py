"""Settings and a device in; dtypes, kernels and samplers out: everything "auto" is settled here, once."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.quant.scheme import Quantisation
from jaxserve.runner.device import dispatch_target
from jaxserve.shapes import Sampler
from pallas_kernels import dispatch
from pallas_kernels.storage import FLOAT8


@dataclass(frozen=True)
class Choice:
    """How a model is computed on a device."""

    dtype: str  # of activations, and of weights that are not quantised
    kv_dtype: str
    kernels: dispatch.Kernels
    quantisation: Quantisation
    samplers: tuple[Sampler, ...]  # that each step size comes with; shapes.py says why


def choose(config: EngineConfig, model: ModelConfig, device: jax.Device) -> Choice:
    """Raises ConfigError for a backend that cannot run this model on this device."""
    on_cpu = device.platform == "cpu"
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    kv_dtype = jnp.dtype(FLOAT8).name if config.cache.kv_cache_dtype == "fp8" else dtype
    options = config.kernels
    try:
        kernels = dispatch.choose(
            dispatch_target(device),
            model.attention_shape(config.cache.page_size, dtype, kv_dtype),
            attention=options.attention_backend,
            sampling=options.sampling_backend,
            matmul=options.matmul_backend,
        )
    except dispatch.BackendError as error:
        raise ConfigError(str(error)) from error
    samplers: tuple[Sampler, ...] = ("full",) if on_cpu else ("greedy", "full")
    if dict(kernels.backends)["sampling"] != "reference":
        samplers = ("sampled", "full")
    quantisation = Quantisation(
        scheme=config.model.quantization, backend=kernels.matmul, required=options.matmul_backend != "auto"
    )
    return Choice(dtype, kv_dtype, kernels, quantisation, samplers)
