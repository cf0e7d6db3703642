"""Every field of SamplingParams does what it says, through the whole engine."""

import queue

import numpy as np
import pytest

from jaxserve import SamplingParams

PROMPT = [17, 301, 44, 250, 99, 12, 333]


def run(llm, prompt=PROMPT, **fields):
    fields = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **fields}
    return llm.generate(prompt, SamplingParams(**fields))[0]


def ids(llm, **fields):
    return run(llm, **fields).outputs[0].token_ids


@pytest.fixture
def plain(llm):
    """Greedy tokens without any parameter."""
    return ids(llm)


def test_stop_token_id_ends_the_sample_and_is_named(llm, plain):
    stop = plain[5]
    output = run(llm, stop_token_ids=[stop]).outputs[0]
    assert output.token_ids == plain[: plain.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_min_tokens_makes_end_tokens_impossible_until_then(llm, plain):
    stop = plain[2]
    output = run(llm, stop_token_ids=[stop], min_tokens=6).outputs[0]
    assert stop not in output.token_ids[:6]
    assert len(output.token_ids) >= 6


def test_eos_ends_a_sample_unless_ignored(llm):
    # The tiny model's end token is 1; force it at some position through the bias.
    output = run(llm, ignore_eos=False, logit_bias={1: 100.0}).outputs[0]
    assert output.token_ids == [1] and output.finish_reason == "stop" and output.stop_reason is None
    ignored = run(llm, ignore_eos=True, logit_bias={1: 100.0}).outputs[0]
    assert ignored.token_ids == [1] * 16 and ignored.finish_reason == "length"
    waited = run(llm, ignore_eos=False, logit_bias={1: 100.0}, min_tokens=3).outputs[0]
    assert 1 not in waited.token_ids[:3] and waited.token_ids[3] == 1


def test_stop_string_cuts_text_and_tokens(llm):
    whole = run(llm, max_tokens=40).outputs[0]
    position = len(whole.text) // 2
    stop = whole.text[position : position + 3]
    cut = run(llm, max_tokens=40, stop=stop).outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    kept = run(llm, max_tokens=40, stop=stop, include_stop_str_in_output=True).outputs[0]
    assert kept.text == cut.text + stop and kept.token_ids == cut.token_ids
    assert llm.stats().pages_used == 0


def test_allowed_token_ids_are_the_only_ones_generated(llm):
    allowed = [10, 20, 30]
    assert set(ids(llm, allowed_token_ids=allowed)) <= set(allowed)
    assert set(ids(llm, allowed_token_ids=allowed, temperature=1.5, seed=1)) == set(allowed)


def test_logit_bias_moves_tokens_in_and_out(llm, plain):
    assert plain[0] not in ids(llm, logit_bias={plain[0]: -100.0})
    assert ids(llm, logit_bias={123: 100.0}) == [123] * 16


def test_bad_words_never_appear_even_across_tokens(llm):
    words = ["fox", "The", "quick"]
    bias = {}
    for word in words:
        for text in (word, " " + word):
            bias.update(dict.fromkeys(llm.tokenizer.encode(text, add_special_tokens=False), 30.0))
    fields = {"logit_bias": bias, "temperature": 1.0, "seed": 3, "max_tokens": 60}
    without = run(llm, **fields).outputs[0].text
    assert any(word in without for word in words), "the bias does not provoke them: the test shows nothing"
    assert not any(word in run(llm, bad_words=words, **fields).outputs[0].text for word in words)


def test_repetition_penalty_keeps_prompt_and_output_tokens_from_coming_back(llm):
    tokens = ids(llm, repetition_penalty=1000.0, max_tokens=40)
    assert len(set(tokens)) == 40 and not set(tokens) & set(PROMPT)


def test_frequency_penalty_counts_generated_tokens_only(llm):
    # 50 leads 51 by 30 and a little: some 15 generated 50s turn that round, and the 40 of the prompt must not.
    fields = {"prompt": [50] * 40, "logit_bias": {50: 60.0, 51: 30.0}, "allowed_token_ids": [50, 51], "max_tokens": 60}
    assert ids(llm, **fields) == [50] * 60
    tokens = ids(llm, frequency_penalty=2.0, presence_penalty=2.0, **fields)
    assert tokens[:3] == [50] * 3 and 51 in tokens


def test_penalties_survive_preemption(make_llm, llm):
    fields = {"repetition_penalty": 1.5, "frequency_penalty": 0.7, "max_tokens": 60, "ignore_eos": True}
    params = SamplingParams(temperature=0.0, **fields)
    prompts = [[i + 2, 7, 9] for i in range(6)]
    tight = make_llm(num_pages=15, max_model_len=80)
    before = tight.stats().preemptions
    outputs = tight.generate(prompts, params)
    assert tight.stats().preemptions > before
    assert [o.outputs[0].token_ids for o in outputs] == [
        o.outputs[0].token_ids for o in llm.generate(prompts, params)
    ]  # fmt: skip


def test_seed_alone_decides_the_draw(llm):
    one = ids(llm, temperature=1.0, seed=42)
    assert ids(llm, temperature=1.0, seed=42) == one != ids(llm, temperature=1.0, seed=43)
    others = llm.generate([[i] * 9 for i in range(3, 6)] + [PROMPT],
                          SamplingParams(temperature=1.0, seed=42, max_tokens=16, ignore_eos=True))  # fmt: skip
    assert others[-1].outputs[0].token_ids == one


def test_requests_without_a_seed_differ_and_the_engine_seed_repeats_them(new_llm):
    params = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)
    runs = []
    for _ in range(2):
        with new_llm(seed=5) as engine:
            runs.append([o.outputs[0].token_ids for o in engine.generate([PROMPT, PROMPT], params)])
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1]


def test_top_k_one_and_tiny_top_p_are_greedy(llm, plain):
    assert ids(llm, temperature=1.0, top_k=1, seed=1) == plain
    assert ids(llm, temperature=1.0, top_p=1e-6, seed=1) == plain
    assert ids(llm, temperature=1.0, min_p=1.0, seed=1) == plain


def test_logprobs_are_those_of_the_raw_logits(llm, plain):
    output = run(llm, logprobs=3, logit_bias={plain[0]: -100.0}, temperature=1.0, seed=2).outputs[0]
    assert len(output.logprobs) == len(output.token_ids) == 16
    first = output.logprobs[0]
    assert first[plain[0]].rank == 1, "the biased token is still the likeliest of the raw logits"
    for token, position in zip(output.token_ids, output.logprobs, strict=True):
        assert token in position and len(position) in (3, 4)
        top = sorted((entry for entry in position.values()), key=lambda entry: entry.rank)
        assert [entry.logprob for entry in top] == sorted((e.logprob for e in top), reverse=True)
        assert top[0].rank == 1 and all(entry.logprob <= 0 for entry in top)
    assert output.cumulative_logprob == pytest.approx(
        sum(p[t].logprob for t, p in zip(output.token_ids, output.logprobs, strict=True))
    )


def test_logprobs_of_zero_give_the_chosen_token_alone(llm, plain):
    output = run(llm, logprobs=0).outputs[0]
    assert [list(position) for position in output.logprobs] == [[token] for token in plain]


def test_prompt_logprobs_are_the_same_chunked_cached_or_whole(make_llm, llm):
    prompt = np.random.default_rng(0).integers(2, 500, 100).tolist()
    whole = run(make_llm(max_num_batched_tokens=128), prompt, prompt_logprobs=2).prompt_logprobs
    assert whole[0] is None and len(whole) == 100
    run(llm, prompt)  # now its pages are cached
    chunked = run(llm, prompt, prompt_logprobs=2).prompt_logprobs
    for token, a, b in zip(prompt[1:], whole[1:], chunked[1:], strict=True):
        assert list(a) == list(b) and next(iter(a)) == token
        np.testing.assert_allclose([e.logprob for e in a.values()], [e.logprob for e in b.values()], atol=1e-4)


def test_detokenize_off_gives_tokens_only(llm, plain):
    output = run(llm, detokenize=False).outputs[0]
    assert output.text == "" and output.token_ids == plain


def test_special_tokens_are_skipped_unless_asked_for(llm):
    fields = {"logit_bias": {1: 100.0}, "max_tokens": 2}
    assert run(llm, **fields).outputs[0].text == ""
    assert run(llm, skip_special_tokens=False, **fields).outputs[0].text == "<|end|><|end|>"


def test_priority_runs_first_under_the_priority_policy(make_llm):
    llm = make_llm(scheduling_policy="priority", max_num_seqs=1, max_num_batched_tokens=32)
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    requests = [llm.admission.request(PROMPT, params, priority=priority) for priority in (5, -1, 0)]
    messages: queue.SimpleQueue = queue.SimpleQueue()
    llm._loop.submit(requests, messages.put)
    finished = []
    while len(finished) < 3:
        finished += [output.request_id for output in messages.get() if output.finish_reason]
    assert finished == [requests[1].id, requests[2].id, requests[0].id]
