"""The laws of the engine: what is generated never depends on how it was scheduled. float32, greedy and seeded."""

from dataclasses import replace

import numpy as np
import pytest

from jaxserve import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=24, ignore_eos=True)
PENALISED = SamplingParams(
    temperature=0.7, seed=3, max_tokens=24, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.4
)
EVERY_KIND = pytest.mark.parametrize("params", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "penalised"])


def prompts(count=8, seed=0, low=3, high=120):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 500, rng.integers(low, high)).tolist() for _ in range(count)]


def tokens(outputs):
    return [sample.token_ids for output in outputs for sample in output.outputs]


@pytest.fixture(scope="module")
def alone(make_llm):
    """alone(params): each prompt of `prompts()` run by itself on a cold engine that takes it whole."""
    known = {}

    def run(params):
        if params.seed not in known:
            llm = make_llm(enable_prefix_caching=False, overlap=0, max_num_batched_tokens=128)
            known[params.seed] = [tokens(llm.generate(prompt, params))[0] for prompt in prompts()]
        return known[params.seed]

    return run


@EVERY_KIND
def test_batched_with_others_yields_same_tokens_as_alone(make_llm, alone, params):
    llm = make_llm(enable_prefix_caching=False, overlap=0, max_num_batched_tokens=128)
    assert tokens(llm.generate(prompts(), params)) == alone(params)


@EVERY_KIND
def test_chunked_prompt_yields_same_tokens_as_whole_prompt(make_llm, alone, params):
    llm = make_llm(max_num_batched_tokens=32)
    llm.reset_prefix_cache()
    before = llm.stats().steps
    assert tokens(llm.generate(prompts()[0], params)) == alone(params)[:1]
    assert llm.stats().steps - before > params.max_tokens, "the prompt was not chunked"
    assert tokens(llm.generate(prompts(), params)) == alone(params)


@EVERY_KIND
@pytest.mark.parametrize("overlap", [0, 1])
def test_overlapped_yields_same_tokens_as_synchronous(make_llm, alone, params, overlap):
    assert tokens(make_llm(overlap=overlap).generate(prompts(), params)) == alone(params)


@EVERY_KIND
@pytest.mark.parametrize("overlap", [0, 1])
def test_preempted_sequences_yield_same_tokens_in_a_pool_of_a_tenth_of_the_need(make_llm, params, overlap):
    params = replace(params, max_tokens=60)
    short = prompts(16, seed=1, low=3, high=20)
    need = sum(-(-(len(prompt) + 60) // 8) for prompt in short)
    pool = need // 10
    tight = make_llm(num_pages=pool + 1, max_model_len=80, overlap=overlap)
    before = tight.stats().preemptions
    outputs = tight.generate(short, params)
    assert tight.stats().preemptions > before
    assert sum(output.metrics.preemptions for output in outputs) > 0
    assert tight.stats().pages_used == 0
    assert tokens(outputs) == tokens(make_llm().generate(short, params))


@EVERY_KIND
def test_cached_prefix_yields_same_tokens_as_cold(llm, alone, params):
    cold = llm.generate(prompts(), params)
    warm = llm.generate(prompts(), params)
    assert tokens(cold) == tokens(warm) == alone(params)
    assert all(output.num_cached_tokens == (len(p) - 1) // 8 * 8 for output, p in zip(warm, prompts(), strict=True))


def test_prefix_new_to_the_cache_is_computed_once_for_a_batch_that_shares_it(llm):
    prefix = prompts(1, seed=5, low=40, high=41)[0]
    before = llm.stats().computed_tokens
    outputs = llm.generate([[*prefix, i + 2] for i in range(4)], SamplingParams(temperature=0.0, max_tokens=1))
    assert llm.stats().computed_tokens - before == 41 + 3 * 1
    assert [output.num_cached_tokens for output in outputs] == [0, 40, 40, 40]


def test_cache_salt_keeps_prefixes_apart(llm):
    prompt = prompts(1, seed=6, low=50, high=51)[0]
    params = SamplingParams(temperature=0.0, max_tokens=1)
    llm.generate(prompt, params, cache_salt="a")
    assert llm.generate(prompt, params, cache_salt="b")[0].num_cached_tokens == 0
    assert llm.generate(prompt, params, cache_salt="a")[0].num_cached_tokens == 48


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_request_resubmitted_from_where_it_stood_goes_on_with_the_same_tokens(llm, alone, params):
    """What a front end does after the engine died: prompt plus the tokens so far, same seed."""
    prompt, whole = prompts()[0], alone(params)[0]
    rest = SamplingParams(
        temperature=params.temperature, top_p=params.top_p, seed=params.seed, max_tokens=14, ignore_eos=True
    )
    assert tokens(llm.generate(prompt + whole[:10], rest)) == [whole[10:]]


@EVERY_KIND
def test_streamed_text_equals_unary_text(llm, params):
    for prompt in prompts(3):
        unary = llm.generate(prompt, params)[0].outputs[0]
        deltas = list(llm.stream(prompt, params))
        assert "".join(delta.text for delta in deltas) == unary.text
        assert [token for delta in deltas for token in delta.token_ids] == unary.token_ids
        assert deltas[-1].finish_reason == unary.finish_reason == "length"


def test_samples_of_one_request_share_the_pages_of_its_prompt(make_llm):
    llm = make_llm(enable_prefix_caching=False)
    prompt = prompts(1, seed=9, low=64, high=65)[0]
    before = llm.stats().computed_tokens
    output = llm.generate(prompt, SamplingParams(n=4, temperature=1.0, seed=1, max_tokens=2))[0]
    # 64 prompt tokens once, the last page of 8 again for each further sample, one decode step for each.
    assert llm.stats().computed_tokens - before <= 64 + 3 * 8 + 4
    assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1
    assert llm.stats().pages_used == 0


def test_sample_of_a_seed_is_the_same_however_many_samples_are_asked_for(llm):
    prompt = prompts(1)[0]
    four = llm.generate(prompt, SamplingParams(n=4, seed=11, max_tokens=8))[0].outputs
    two = llm.generate(prompt, SamplingParams(n=2, seed=11, max_tokens=8))[0].outputs
    assert [s.token_ids for s in two] == [s.token_ids for s in four[:2]]


def test_all_pages_are_free_or_cached_when_idle(llm):
    llm.generate(prompts(), GREEDY)
    stats = llm.stats()
    assert stats.pages_used == stats.running == stats.waiting == 0
