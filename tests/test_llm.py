"""The Python API: what goes in, what comes out, and that nothing a caller does leaves the engine worse off."""

import dataclasses
import signal
import threading
import time

import pytest

import jaxserve
from jaxserve import SamplingParams
from jaxserve.errors import (
    ConfigError,
    CorruptFileError,
    EmptyPromptError,
    EngineError,
    InvalidRequestError,
    MemoryPlanError,
    ModelNotFoundError,
    PromptTooLongError,
    RequestTooLargeError,
    TokenOutOfRangeError,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
CHAT = [{"role": "user", "content": "Hello fox"}]


# ---- what goes in and what comes out


def test_outputs_come_in_the_order_of_prompts_whatever_their_kind(llm):
    outputs = llm.generate(["The quick", [5, 6, 7], "lazy dog. " * 9], GREEDY)
    assert [output.prompt for output in outputs] == ["The quick", None, "lazy dog. " * 9]
    assert outputs[1].prompt_token_ids == [5, 6, 7]
    assert all(output.finished and len(output.outputs[0].token_ids) == 8 for output in outputs)


def test_one_prompt_gives_a_list_of_one_and_no_prompt_an_empty_list(llm):
    assert len(llm.generate("The", GREEDY)) == len(llm.generate([5, 6], GREEDY)) == 1
    assert llm.generate([], GREEDY) == []


def test_each_prompt_may_have_parameters_of_its_own(llm):
    outputs = llm.generate(["a b", "a b"], [GREEDY, dataclasses.replace(GREEDY, max_tokens=3)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 3]
    with pytest.raises(InvalidRequestError, match="params holds 1 entries for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])


def test_parameters_default_to_the_generation_config_of_the_checkpoint(llm, make_llm):
    assert llm.default_sampling_params() == SamplingParams(temperature=0.7, top_k=40)
    assert llm.default_sampling_params(temperature=0.0).top_k == 40
    assert make_llm(generation_config="none").default_sampling_params() == SamplingParams()


def test_chat_goes_through_the_template(llm):
    rendered = "<|start|>user\nHello fox<|end|>\n<|start|>assistant\n"
    assert llm.render(CHAT) == rendered
    chat = llm.chat(CHAT, GREEDY)[0]
    assert chat.prompt == rendered
    assert chat.prompt_token_ids == llm.tokenizer.encode(rendered, add_special_tokens=False)
    assert len(llm.chat([CHAT, CHAT], GREEDY)) == 2
    assert "".join(delta.text for delta in llm.stream(CHAT, GREEDY)) == chat.outputs[0].text


def test_metrics_and_counts_add_up(llm):
    before = llm.stats()
    output = llm.generate("The quick brown fox", GREEDY)[0]
    metrics = output.metrics
    assert 0 <= metrics.queue_time <= metrics.time_to_first_token
    assert metrics.arrival_time <= metrics.scheduled_time <= metrics.first_token_time <= metrics.last_token_time
    assert metrics.time_per_output_token == pytest.approx((metrics.last_token_time - metrics.first_token_time) / 7)
    after = llm.stats()
    assert after.generated_tokens - before.generated_tokens == 8
    assert after.prompt_tokens - before.prompt_tokens == len(output.prompt_token_ids)


def test_generate_keeps_one_engine_and_returns_text(tiny_model, monkeypatch, xla_cache):
    made = []
    real = jaxserve.LLM
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "num_pages": 65, "max_model_len": 256}

    def counted(model):
        made.append(real(model, show_progress=False, compilation_cache_dir=str(xla_cache), **options))
        return made[-1]

    monkeypatch.setattr("jaxserve.llm.LLM", counted)
    one = jaxserve.generate("The quick", tiny_model, temperature=0.0, max_tokens=4)
    many = jaxserve.generate(["The quick", "lazy"], tiny_model, temperature=0.0, max_tokens=4)
    assert isinstance(one, str) and many[0] == one and len(many) == 2 and len(made) == 1
    made[0].close()
    jaxserve.llm._cached.clear()


# ---- bad input: a clear error, and the engine serves on

BAD_REQUESTS = {
    "empty text": ("", {}, EmptyPromptError, "prompt is empty"),
    "no tokens": ([[]], {}, EmptyPromptError, "prompt is empty"),
    "token beyond the vocabulary": ([5, 512], {}, TokenOutOfRangeError, r"512, outside \[0, 512\)"),
    "negative token": ([5, -1], {}, TokenOutOfRangeError, r"-1, outside \[0, 512\)"),
    "float token": ([[5, 1.5]], {}, InvalidRequestError, "1.5"),
    "prompt as long as the context": ([7] * 256, {}, PromptTooLongError, "maximum context length is 256"),
    "not a prompt": (7, {}, InvalidRequestError, "prompts must be text"),
    "lone surrogate": ("a\ud800", {}, InvalidRequestError, "surrogate"),
    "stop token beyond the vocabulary": ("a", {"stop_token_ids": [999]}, TokenOutOfRangeError, "stop_token_ids.*999"),
    "bias beyond the vocabulary": ("a", {"logit_bias": {600: 1.0}}, TokenOutOfRangeError, "logit_bias.*600"),
    "allowed beyond the vocabulary": ("a", {"allowed_token_ids": [512]}, TokenOutOfRangeError, "allowed_token_ids"),
    "too many logprobs": ("a", {"logprobs": 21}, InvalidRequestError, "logprobs=21 exceeds max_logprobs=20"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request_is_refused_by_name_and_the_engine_serves_on(llm, case):
    prompt, overrides, kind, message = BAD_REQUESTS[case]
    with pytest.raises(kind, match=message):
        llm.generate(prompt, dataclasses.replace(GREEDY, **overrides))
    assert len(llm.generate("The quick", GREEDY)[0].outputs[0].token_ids) == 8


def test_one_bad_prompt_of_many_runs_none_of_them(llm):
    before = llm.stats().prompt_tokens
    with pytest.raises(EmptyPromptError):
        llm.generate(["The quick", ""], GREEDY)
    assert llm.stats().prompt_tokens == before


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_timeout_must_be_positive(llm, timeout):
    with pytest.raises(InvalidRequestError, match=f"timeout={timeout}"):
        llm.generate("a", GREEDY, timeout=timeout)


def test_request_that_could_never_fit_the_pool_is_refused_with_the_numbers(llm, monkeypatch):
    # No start-up allows such a pool, so it is shrunk in the validator's eyes.
    monkeypatch.setattr(llm.admission, "_limits", dataclasses.replace(llm.admission._limits, num_pages=5))
    with pytest.raises(RequestTooLargeError, match="may grow to 103 tokens, 13 pages of 8, but the KV pool has 4"):
        llm.generate([7] * 3, dataclasses.replace(GREEDY, max_tokens=100))


def test_unusable_models_fail_at_once_naming_the_file(tmp_path, tiny_model):
    with pytest.raises(ModelNotFoundError, match="no/such/model/here"):
        jaxserve.LLM("no/such/model/here", show_progress=False)
    corrupt = tmp_path / "model.gguf"
    corrupt.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 16)
    with pytest.raises(CorruptFileError, match=r"model\.gguf"):
        jaxserve.LLM(corrupt, show_progress=False)


def test_pool_too_small_for_one_sequence_is_refused_with_the_numbers(tiny_model, xla_cache):
    with pytest.raises(MemoryPlanError, match="4 pages.*32 tokens.*max_model_len=256.*32 pages.*num_pages"):
        jaxserve.LLM(tiny_model, num_pages=5, page_size=8, max_model_len=256, show_progress=False)


def test_context_beyond_the_model_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="max_model_len=1024 exceeds the 512"):
        jaxserve.LLM(tiny_model, max_model_len=1024, show_progress=False)


# ---- leaving early


def test_interrupt_frees_every_page_and_the_engine_serves_on(llm, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without one
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    endless = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    expected = llm.generate("The quick", GREEDY)[0].outputs[0].token_ids
    main = threading.main_thread().ident

    def interrupt():
        while llm.stats().running == 0:
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(50):  # the signal comes in the first round
            llm.generate([[i + 2] * 20 for i in range(8)], endless)
    thread.join()
    stats = llm.stats()
    assert stats.pages_used == stats.running == stats.waiting == 0
    assert llm.generate("The quick", GREEDY)[0].outputs[0].token_ids == expected


def test_leaving_a_stream_early_frees_its_pages(llm):
    stream = llm.stream("The quick", SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm.stats().pages_used == llm.stats().running == 0


def test_timeout_ends_a_request_with_what_it_has(llm):
    params = SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True)
    output = llm.generate("The quick", params, timeout=0.05)[0].outputs[0]
    assert output.finish_reason == "abort" and output.stop_reason == "deadline_exceeded"
    assert len(output.token_ids) < 240
    assert llm.stats().pages_used == 0


def test_streams_can_be_read_in_turn(llm):
    expected = [llm.generate(prompt, GREEDY)[0].outputs[0].text for prompt in ("The quick", "lazy dog")]
    streams = [llm.stream(prompt, GREEDY) for prompt in ("The quick", "lazy dog")]
    texts = ["", ""]
    for deltas in zip(*streams, strict=True):
        texts = [text + delta.text for text, delta in zip(texts, deltas, strict=True)]
    assert texts == expected


def test_closed_engine_says_so(new_llm):
    with new_llm() as llm:
        llm.generate("a", GREEDY)
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.generate("a", GREEDY)
