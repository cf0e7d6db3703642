"""The sampler, compiled for a GPU that is not there."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.backend import Backend
from pallas_kernels.sampling import api, triton
from tests.aot.hopper import compile_kernel

pytestmark = pytest.mark.aot

H200 = Backend("triton", device="NVIDIA H200", num_cores=132)
SHAPES = [(1, 128256), (256, 128256), (64, 151936)]  # rows, vocabulary


def shapes(rows, vocab):
    """(logits, the other arguments of `sample` by name); as many slots as rows."""
    columns = {
        jnp.float32: "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty",
        jnp.int32: "top_k positions adjusts slots",
        jnp.uint32: "seeds",
    }
    given = {name: jax.ShapeDtypeStruct((rows,), dtype) for dtype, names in columns.items() for name in names.split()}
    given["bitmask"] = jax.ShapeDtypeStruct((rows, -(-vocab // 32)), jnp.uint32)
    given["token_counts"] = jax.ShapeDtypeStruct((rows, vocab), jnp.int32)
    given["logit_bias"] = jax.ShapeDtypeStruct((rows, vocab), jnp.float32)
    return jax.ShapeDtypeStruct((rows, vocab), jnp.float32), given


@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_sample_is_one_kernel_without_spills_and_with_one_row_of_scratch_a_row(rows, vocab):
    logits, given = shapes(rows, vocab)
    report = compile_kernel(lambda x, given: api.sample(x, **given, backend=H200), logits, given)
    assert list(report.kernels) == ["sample"]
    kernel = report.kernels["sample"]
    assert kernel.spill_bytes == 0
    assert kernel.registers * 32 * triton.choose(rows, vocab, H200).num_warps <= 65536
    assert kernel.count("LDG", "128") >= 12  # raw logits, counts and biases, in both passes over the row
    assert report.temp_bytes <= logits.size * 4 + (1 << 20)
    assert report.text.count("custom-call(") == 1 and "sort" not in report.text.lower()


@pytest.mark.parametrize("config", triton.candidates(128256), ids=str)
def test_no_configuration_a_tuner_may_try_spills(config):
    logits, given = shapes(256, 128256)
    run = functools.partial(triton.sample, config=config, interpret=False)
    report = compile_kernel(lambda x, given: run(x, **given), logits, given)
    assert report.kernels["sample"].spill_bytes == 0


def test_sampling_is_captured_in_a_command_buffer():
    """Six dependent draws: the compiler captures no fewer than five kernels."""

    def chain(logits, given):
        for _ in range(6):
            given = {**given, "positions": api.sample(logits, **given, backend=H200)}
        return given["positions"]

    report = compile_kernel(chain, *shapes(8, 49152))
    assert report.command_buffers == [6]
    assert not report.loose_thunks.keys() & {"kWhile", "kConditional"}
