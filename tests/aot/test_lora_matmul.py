"""Low-rank adapters, compiled for a GPU that is not there."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.backend import Backend
from pallas_kernels.lora_matmul.api import expand, plan_adapters, shrink
from tests.aot.hopper import compile_kernel

pytestmark = pytest.mark.aot

ADAPTERS, INPUTS, OUTPUTS = 8, 4096, 6144


def adapt(x, a, b, y, adapters):
    plan = plan_adapters(adapters, a.shape[0])
    return expand(shrink(x, a, plan, backend=Backend("triton")), b, y, plan, backend=Backend("triton"))


def compiled(num_tokens, rank, dtype):
    shapes = ((num_tokens, INPUTS), (ADAPTERS, INPUTS, rank), (ADAPTERS, rank, OUTPUTS), (num_tokens, OUTPUTS))
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return compile_kernel(adapt, *operands, jax.ShapeDtypeStruct((num_tokens,), jnp.int32), donate=(3,))


@pytest.mark.parametrize("rank", [8, 16, 64, 128])
@pytest.mark.parametrize("num_tokens", [1, 64, 2048])
def test_adapters_use_tensor_cores_and_add_in_place_without_spills(num_tokens, rank):
    report = compiled(num_tokens, rank, jnp.bfloat16)
    tensor_core = "HGMMA" if num_tokens == 2048 else "HMMA"
    for name in ("lora_shrink", "lora_expand"):
        assert report.kernels[name].spill_bytes == 0
        assert report.kernels[name].count(tensor_core) > 0
    assert report.kernels["lora_shrink"].count("LDGSTS", "128") > 0
    assert report.alias_bytes == num_tokens * OUTPUTS * 2


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize("num_tokens", [8, 2048])
def test_other_dtypes_spill_nothing(num_tokens, dtype):
    for rank in (16, 128):
        kernels = compiled(num_tokens, rank, dtype).kernels
        assert kernels["lora_shrink"].spill_bytes == kernels["lora_expand"].spill_bytes == 0
