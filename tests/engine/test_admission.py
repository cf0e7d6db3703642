"""Whatever a caller asks for is refused by name here, or runs: the engine behind this door must never meet it."""

import math
from typing import Any

import pytest

from jaxserve import SamplingParams
from jaxserve.engine.admission import Admission
from jaxserve.errors import InvalidRequestError

PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def admission_with(llm: Any, vocab_size: int) -> Admission:
    return Admission(
        llm.tokenizer,
        llm.prepared.limits,
        vocab_size=vocab_size,
        eos_token_ids=(),
        max_logprobs=20,
        seed=0,
    )


def test_bad_word_of_tokens_the_model_lacks_is_no_concern_of_the_engine(llm):
    word = "The"
    longest = max(llm.tokenizer.encode(word, add_special_tokens=False))
    small = admission_with(llm, vocab_size=longest)
    params = SamplingParams(max_tokens=4, bad_words=[word, "q"])
    words = small.request([1, 2, 3], params).bad_word_token_ids
    assert words and all(max(ids) < longest for ids in words)


def test_salt_that_is_no_text_is_refused(llm):
    with pytest.raises(InvalidRequestError) as refused:
        llm.generate([[5, 6, 7]], PARAMS, cache_salt="salt\ud800")
    assert refused.value.field == "cache_salt"
    assert len(llm.generate([[5, 6, 7]], PARAMS)) == 1


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan, "5", True, b"1"])
def test_timeout_that_is_no_positive_number_is_refused(llm, timeout):
    with pytest.raises(InvalidRequestError) as refused:
        llm.generate([[5, 6, 7]], PARAMS, timeout=timeout)
    assert refused.value.field == "timeout"


@pytest.mark.parametrize("timeout", [60, 60.0, 1e300, math.inf])
def test_timeout_may_be_any_positive_number(llm, timeout):
    [output] = llm.generate([[5, 6, 7]], PARAMS, timeout=timeout)
    assert output.outputs[0].finish_reason == "length"
