"""Products by group, compiled for a GPU that is not there."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.backend import Backend
from pallas_kernels.grouped_matmul.api import block_size, grouped_matmul, plan_groups
from tests.aot.hopper import compile_kernel

pytestmark = pytest.mark.aot


def run(x, weights, experts, *, size):
    plan = plan_groups(experts.reshape(-1), weights.shape[0], size)
    return grouped_matmul(x, weights, plan, rows_per_token=experts.shape[1], backend=Backend("triton"))


# Mixtral 8x7B and Qwen3-30B-A3B, in decode and in prefill
@pytest.mark.parametrize("num_tokens", [1, 64, 4096])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_inputs", "num_outputs"),
    [(8, 2, 4096, 28672), (8, 2, 14336, 4096), (128, 8, 2048, 1536)],
)
def test_experts_stream_to_the_tensor_cores_without_spills(num_experts, top_k, num_inputs, num_outputs, num_tokens):
    size = block_size(num_tokens * top_k, num_experts)
    x = jax.ShapeDtypeStruct((num_tokens, num_inputs), jnp.bfloat16)
    weights = jax.ShapeDtypeStruct((num_experts, num_inputs, num_outputs), jnp.bfloat16)
    experts = jax.ShapeDtypeStruct((num_tokens, top_k), jnp.int32)
    compiled = compile_kernel(functools.partial(run, size=size), x, weights, experts)
    kernel = compiled.kernels["grouped_matmul"]
    assert kernel.spill_bytes == 0
    assert kernel.count("LDGSTS", "128") > 0
    assert kernel.count("HGMMA" if size >= 64 else "HMMA") > 0
    # The plan and its sort only: no token is repeated for its experts, no row is moved or padded.
    assert compiled.temp_bytes < 100_000 + num_tokens * top_k * 16


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_other_dtypes_spill_nothing(dtype):
    for num_tokens in (4, 4096):
        x, weights = jax.ShapeDtypeStruct((num_tokens, 576), dtype), jax.ShapeDtypeStruct((8, 576, 1000), dtype)
        experts = jax.ShapeDtypeStruct((num_tokens, 2), jnp.int32)
        compiled = compile_kernel(functools.partial(run, size=block_size(num_tokens * 2, 8)), x, weights, experts)
        assert compiled.kernels["grouped_matmul"].spill_bytes == 0
