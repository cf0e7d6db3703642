"""The kernels' backends and the pool's dtype, through the engine: what is generated does not depend on the first."""

import jax
import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.engine.build import plan_memory_for
from jaxserve.errors import ConfigError

GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=7, max_tokens=16, ignore_eos=True)
PENALISED = SamplingParams(temperature=0.7, seed=3, max_tokens=16, ignore_eos=True, repetition_penalty=1.3, min_p=0.05)
LOGPROBS = SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=2, max_tokens=4, ignore_eos=True)
KERNELS = {"attention_backend": "triton", "sampling_backend": "triton"}
REFERENCE = {"attention_backend": "reference", "sampling_backend": "reference"}
SIZES = {"max_num_seqs": 2, "max_num_batched_tokens": 32}  # few programs to compile


def prompts(count=4, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 500, rng.integers(3, 60)).tolist() for _ in range(count)]


def tokens(outputs):
    return [sample.token_ids for output in outputs for sample in output.outputs]


@pytest.mark.kernels
@pytest.mark.parametrize("params", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "penalised"])
def test_kernels_yield_the_tokens_of_plain_jax(make_llm, params):
    plain, kernels = (make_llm(**SIZES, **backends) for backends in (REFERENCE, KERNELS))
    assert tokens(kernels.generate(prompts(), params)) == tokens(plain.generate(prompts(), params))


@pytest.mark.kernels
def test_kernels_yield_the_log_probabilities_of_plain_jax(make_llm):
    plain, kernels = (make_llm(**SIZES, **backends).generate(prompts(2), LOGPROBS) for backends in (REFERENCE, KERNELS))
    for mine, theirs in zip(kernels, plain, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        for found, expected in zip(mine.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
            assert found.keys() == expected.keys()
            for token, logprob in found.items():
                assert logprob.logprob == pytest.approx(expected[token].logprob, abs=1e-4)


@pytest.mark.kernels
def test_steps_without_log_probabilities_take_the_branchless_sampler(make_llm):
    ladder = make_llm(**SIZES, **KERNELS).prepared.ladder
    assert {shape.sampler for shape in ladder} == {"sampled", "full"}


@pytest.mark.parametrize("backends", [REFERENCE, pytest.param(KERNELS, marks=pytest.mark.kernels)])
def test_float8_pool_obeys_the_laws_and_stays_close_to_float32(make_llm, backends):
    """A token's keys are quantised by themselves, so neither neighbours nor a cached prefix change them."""
    small = make_llm(**SIZES, **backends, kv_cache_dtype="fp8")
    together = tokens(small.generate(prompts(), GREEDY))
    assert tokens(small.generate(prompts(), GREEDY)) == together, "cached prefixes gave other tokens"
    small.reset_prefix_cache()
    assert [tokens(small.generate(prompt, GREEDY))[0] for prompt in prompts()] == together
    exact = tokens(make_llm(**SIZES, **REFERENCE).generate(prompts(), GREEDY))
    assert sum(mine[0] == theirs[0] for mine, theirs in zip(together, exact, strict=True)) >= 3


def test_float8_pool_holds_more_tokens_in_the_same_memory(tiny_model, xla_cache):
    options = {"model": str(tiny_model), "compilation_cache_dir": str(xla_cache), "show_progress": False, **SIZES}
    pages = {
        kv_cache_dtype: plan_memory_for(
            EngineConfig.from_options(**options, kv_cache_memory_bytes=1 << 20, kv_cache_dtype=kv_cache_dtype)
        ).num_pages
        for kv_cache_dtype in ("auto", "fp8")
    }
    assert pages["fp8"] == pytest.approx(
        pages["auto"] * 4 * 16 / (16 + 4), rel=0.02
    )  # head size 16, a scale of 4 bytes


def test_backend_that_cannot_run_here_is_refused_with_the_reason(build_llm):
    with pytest.raises(ConfigError, match="attention_backend=mosaic cannot run here"):
        build_llm(attention_backend="mosaic")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_gpu_runs_the_kernels_by_default(make_llm):
    kernels = make_llm(**SIZES).prepared.dimensions.kernels
    assert set(dict(kernels.backends).values()) == {"triton"}
