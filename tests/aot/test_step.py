"""The engine's own step of Llama 3 8B, compiled for a GPU that is not there: what it copies, keeps, and launches."""

import functools
import math
import re

import jax
import pytest

from jaxserve.models.registry import model_config
from jaxserve.quant.scheme import UNQUANTISED
from jaxserve.runner.dimensions import Dimensions
from jaxserve.runner.executables import step_arguments, trace_step
from jaxserve.shapes import StepShape
from pallas_kernels import dispatch
from tests.aot.hopper import Report, placed, report

pytestmark = pytest.mark.aot

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
NUM_PAGES, PAGE = 16384, 16  # 32 GiB of bfloat16 keys and values: 262,144 tokens
H200 = dispatch.Target("gpu", "NVIDIA H200", (9, 0), 132)
DECODE, MIXED = StepShape(64, 64, "sampled"), StepShape(2048, 64, "sampled")


def sizes(kv_dtype: str, num_layers: int) -> Dimensions:
    model = model_config({**LLAMA_3_8B, "num_hidden_layers": num_layers})
    shape = model.attention_shape(PAGE, "bfloat16", kv_dtype)
    return Dimensions(
        model=model,
        kernels=dispatch.choose(H200, shape),
        quantisation=UNQUANTISED,
        dtype="bfloat16",
        kv_dtype=kv_dtype,
        platform="gpu",
        num_pages=NUM_PAGES,
        page_size=PAGE,
        max_num_seqs=64,
        max_model_len=8192,
        max_logprobs=20,
    )


@functools.cache
def compiled(shape: StepShape, kv_dtype: str = "bfloat16", num_layers: int = 32) -> tuple[Dimensions, Report]:
    dimensions = sizes(kv_dtype, num_layers)

    def compile_():
        return trace_step(dimensions, shape, placed(step_arguments(dimensions, shape))).lower().compile()

    return dimensions, report(compile_, disassemble=False)


def nbytes(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def produced(text: str) -> list[tuple[str, int]]:
    """(operation, bytes) of all that the optimised program writes somewhere new, by what it is."""
    found = []
    for kind, dims, operation in re.findall(
        r"= (\w+)\[([\d,]*)\]\S* (copy|fusion|gather|concatenate|transpose)\(", text
    ):
        width = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f8e4m3fn": 1}.get(kind, 1)
        found.append((operation, width * math.prod(int(d) for d in dims.split(",") if d)))
    return found


@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn"])
def test_pool_and_slots_are_updated_in_place(shape, kv_dtype):
    dimensions, found = compiled(shape, kv_dtype, num_layers=4)
    state = nbytes(dimensions.kv_shapes()) + nbytes(dimensions.slot_shapes())
    assert found.alias_bytes >= state
    assert found.compiled.memory_analysis().output_size_in_bytes - found.alias_bytes < 1 << 20


@pytest.mark.parametrize("shape", [DECODE, MIXED], ids=["decode", "mixed"])
def test_nothing_as_large_as_a_layer_is_copied_or_kept(shape):
    """A layer of the pool, or of the weights: whichever is smaller."""
    dimensions, found = compiled(shape, num_layers=4)
    layer = min(nbytes(dimensions.kv_shapes()) // 4, nbytes(step_arguments(dimensions, shape)[0].layers[0]))
    assert found.temp_bytes < layer
    large = [entry for entry in produced(found.text) if entry[1] >= layer]
    assert not large, large


def test_temporaries_of_a_decode_step_do_not_grow_with_the_layers():
    few, many = (compiled(DECODE, num_layers=n)[1].temp_bytes for n in (4, 32))
    assert many < few + (1 << 20)


def test_whole_decode_step_is_one_command_buffer():
    _, found = compiled(DECODE)
    assert len(found.command_buffers) == 1 and not found.loose_thunks, (found.command_buffers, found.loose_thunks)


@pytest.mark.parametrize("sampler", ["greedy", "full"])
def test_other_samplers_compile_too(sampler):
    _, found = compiled(StepShape(64, 64, sampler), num_layers=4)
    assert found.temp_bytes < 1 << 30
