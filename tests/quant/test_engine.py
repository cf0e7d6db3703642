"""Quantised weights through the engine: what is generated is reproducible, close to the model's own, and cheaper."""

import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SIZES = {"max_num_seqs": 2, "max_num_batched_tokens": 32}  # few programs to compile


def prompts(count=4, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 500, rng.integers(3, 60)).tolist() for _ in range(count)]


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.kernels
def test_kernels_and_plain_jax_generate_the_same_tokens_again_and_again(make_llm):
    plain, kernels = (
        make_llm(**SIZES, quantization="int4", matmul_backend=backend) for backend in ("reference", "triton")
    )
    expected = tokens(plain.generate(prompts(), GREEDY))
    assert tokens(kernels.generate(prompts(), GREEDY)) == expected
    assert [tokens(plain.generate([prompt], GREEDY))[0] for prompt in prompts()] == expected


def test_eight_bits_mostly_generate_what_the_model_does(make_llm):
    exact = tokens(make_llm(**SIZES).generate(prompts(), GREEDY))
    narrow = tokens(make_llm(**SIZES, quantization="int8", matmul_backend="reference").generate(prompts(), GREEDY))
    assert sum(mine[0] == theirs[0] for mine, theirs in zip(narrow, exact, strict=True)) >= 3


def test_the_memory_plan_counts_narrow_weights(make_llm):
    wide, narrow = (
        make_llm(**SIZES, **options).prepared.plan.weight_bytes
        for options in ({}, {"quantization": "int8", "matmul_backend": "reference"})
    )
    table = 512 * 64 * 4  # the embedding, which is the head too
    assert narrow - table < 0.3 * (wide - table)  # of float32


def test_an_unknown_scheme_is_refused_by_name(tiny_model):
    with pytest.raises(ConfigError, match="int3"):
        EngineConfig.from_options(model=str(tiny_model), quantization="int3")
