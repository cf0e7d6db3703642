"""Products with quantised weights, compiled for a GPU that is not there."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxserve.quant.scheme import Quantisation
from jaxserve.runner.executables import step_arguments, trace_step
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.quant_matmul import triton
from pallas_kernels.quant_matmul.api import quant_matmul
from pallas_kernels.quant_matmul.weight import quantise
from tests.aot.hopper import compile_kernel, placed, report
from tests.aot.test_step import DECODE, MIXED, sizes

pytestmark = pytest.mark.aot

SCHEMES = [("int8", 64), ("fp8", 64), ("int4", 32), ("int4", 64), ("int4", 128)]
LLAMA_8B = [(4096, 28672), (14336, 4096)]
SMOLLM2 = [(576, 960), (1536, 576)]
multiply = functools.partial(quant_matmul, backend=Backend("triton"))


def operands(num_tokens, num_inputs, num_outputs, scheme, group, dtype=jnp.bfloat16):
    matrix = jax.ShapeDtypeStruct((num_inputs, num_outputs), dtype)
    weight = jax.eval_shape(lambda w: quantise(w, scheme, group), matrix)
    return jax.ShapeDtypeStruct((num_tokens, num_inputs), dtype), weight


@pytest.mark.parametrize(("scheme", "group"), SCHEMES)
@pytest.mark.parametrize("num_tokens", [1, 32, 64, 2048])
@pytest.mark.parametrize("size", LLAMA_8B)
def test_weights_stream_in_128_bit_copies_to_the_tensor_cores_without_spills(size, num_tokens, scheme, group):
    compiled = compile_kernel(multiply, *operands(num_tokens, *size, scheme, group))
    kernel = compiled.kernels[f"quant_matmul_{scheme}"]
    assert kernel.spill_bytes == 0
    assert kernel.count("LDGSTS", "128") > 0
    assert kernel.count("HGMMA" if num_tokens >= 64 else "HMMA") > 0
    assert kernel.count("I2F") == 0 and kernel.count("F2F.") == 0  # these run at a quarter of the speed
    # Shares of a split contraction at most: never a weight at its full width.
    assert compiled.temp_bytes <= 16 * num_tokens * size[1] * 4 and compiled.temp_bytes < size[0] * size[1] / 2


@pytest.mark.parametrize(("scheme", "group"), [("int8", 64), ("int4", 32), ("int4", 64)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("size", SMOLLM2)
def test_small_models_spill_nothing_in_any_dtype(size, dtype, scheme, group):
    for num_tokens in (1, 256):
        kernel = compile_kernel(multiply, *operands(num_tokens, *size, scheme, group, dtype)).kernels
        assert kernel[f"quant_matmul_{scheme}"].spill_bytes == 0
        assert (kernel[f"quant_matmul_{scheme}"].count("FFMA") > 64) == (dtype == jnp.float32)


@pytest.mark.parametrize("num_tokens", [16, 512])
def test_every_candidate_fits_the_device(num_tokens):
    scheme = "int4"
    x, weight = operands(num_tokens, 4096, 6144, scheme, 64)
    for config in triton.candidates(num_tokens, weight, x.dtype, 132):
        run = functools.partial(triton.quant_matmul, out_dtype=x.dtype, backend=Backend("triton"), config=config)
        assert compile_kernel(run, x, weight).kernels[f"quant_matmul_{scheme}"].instructions


def test_dynamic_float8_reaches_cublaslt_in_float8():
    x, weight = operands(256, 4096, 6144, "fp8_dynamic", 64)
    run = jax.jit(functools.partial(quant_matmul, backend=REFERENCE))
    # A device would measure both; here only the choice without Triton's own product shows the rewrite.
    compiled = report(
        lambda: run.lower(*placed((x, weight))).compile({"xla_gpu_enable_triton_gemm": False}), disassemble=False
    )
    assert "__cublas$lt$matmul$f8" in compiled.text


def test_reference_of_eight_bits_is_fused_without_a_wide_weight():
    compiled = compile_kernel(functools.partial(quant_matmul, backend=REFERENCE), *operands(16, 4096, 6144, "int8", 64))
    assert compiled.temp_bytes < 4096 * 6144


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_engines_step_never_holds_a_wide_weight_and_decodes_in_one_command_buffer(shape, scheme):
    quantisation = Quantisation(scheme, backend=Backend("triton", "NVIDIA H200", 132))
    dimensions = replace(sizes("bfloat16", 4), quantisation=quantisation)
    arguments = placed(step_arguments(dimensions, shape))
    found = report(lambda: trace_step(dimensions, shape, arguments).lower().compile(), disassemble=False)
    gate_up = ("bf16[4096,2,14336]", "bf16[28672,4096]", "bf16[4096,28672]")
    assert not any(array in found.text for array in gate_up)
    if shape == DECODE:
        assert found.temp_bytes < 4096 * 28672 and len(found.command_buffers) == 1 and not found.loose_thunks
