"""The only file that names a deprecated or version-bound JAX API, so that JAX 0.10.2, 0.11.2 and 0.12.0.1 all work.

WHOLE, triton_call, load, store, dot, barrier   Pallas-Triton, deprecated since JAX 0.11.0
mosaic                                          Pallas Mosaic GPU, imported only by those who use it
abstract_gpu                                    lowering for a GPU on a host that has none
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

load, store, dot = pltriton.load, pltriton.store, pltriton.dot
inline_asm = pltriton.elementwise_inline_asm
barrier = pltriton.debug_barrier  # among the threads of one program; interpreted kernels must do without

# An operand that a kernel indexes by itself; blocks of a BlockSpec are loaded by Pallas.
WHOLE = pl.BlockSpec(memory_space=pl.ANY)

# Announced since 0.11.0; what replaces it is another backend file, not another spelling.
warnings.filterwarnings("ignore", message=".*[Tt]riton.*deprecated.*", category=DeprecationWarning)


def triton_call(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    num_warps: int,
    num_stages: int,
    interpret: bool,
    in_specs: Sequence[pl.BlockSpec] | None = None,
    out_specs: Any = None,
    aliases: Mapping[int, int] | None = None,
) -> Callable[..., Any]:
    """`pl.pallas_call` of a Triton kernel; without specs all operands and results are WHOLE.

    aliases: input -> output written in place. interpret: run as plain JAX on any device, for tests.
    """

    def call(*operands: Any) -> Any:
        return pl.pallas_call(
            kernel,
            name=name,
            grid=grid,
            out_shape=out_shape,
            in_specs=[WHOLE] * len(operands) if in_specs is None else list(in_specs),
            out_specs=jax.tree.map(lambda _: WHOLE, out_shape) if out_specs is None else out_specs,
            input_output_aliases=dict(aliases or {}),
            interpret=interpret,
            # Without these 0.10.2 would take Mosaic GPU.
            compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        )(*operands)

    return call


def mosaic() -> ModuleType:
    """The Mosaic GPU module. Raises ImportError where absl-py is missing, which 0.10.2 does not declare."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return plgpu


def mosaic_store(ref: Any, value: jax.Array) -> None:
    """Writes shared memory that has no swizzle: bank conflicts and all, which 0.12 wants to be told are accepted."""
    plgpu = mosaic()
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def mosaic_interpreter(**options: Any) -> Any:
    """What `plgpu.kernel(interpret=...)` takes to run on any device; options as of InterpretGPUParams."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public since 0.11

    return InterpretGPUParams(**options)


@contextlib.contextmanager
def abstract_gpu(device_kind: str = "NVIDIA H200", num_cores: int = 132) -> Iterator[None]:
    """Inside, kernels lower for such a GPU wherever this runs; since 0.11 lowering asks which one is meant."""
    from jax._src.mesh import AbstractDevice

    device = AbstractDevice(device_kind=device_kind, num_cores=num_cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield
