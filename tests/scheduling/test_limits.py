import pytest

from jaxserve.errors import ConfigError, EmptyPromptError, PromptTooLongError, RequestTooLargeError
from jaxserve.scheduling.limits import Limits

SIZES = dict(num_pages=5, page_size=4, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=20)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_pages", 1), ("page_size", 0), ("max_num_seqs", 0), ("max_model_len", 1), ("max_num_batched_tokens", 1)],
)
def test_size_that_cannot_work_is_refused_by_name_and_value(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value} must be at least"):
        Limits(**{**SIZES, name: value})


def test_final_length_is_bounded_by_max_tokens_and_by_the_model(make_request):
    limits = Limits(**{**SIZES, "num_pages": 6})
    assert limits.final_length(make_request("a", [1] * 3, max_tokens=4)) == 7
    assert limits.final_length(make_request("a", [1] * 3, max_tokens=400)) == 20
    assert limits.final_length(make_request("a", [1] * 19, max_tokens=None)) == 20


def test_empty_prompt_is_refused(make_request):
    with pytest.raises(EmptyPromptError, match="prompt_token_ids"):
        Limits(**SIZES).final_length(make_request("a", []))


def test_prompt_without_room_for_a_token_is_refused_with_both_numbers(make_request):
    with pytest.raises(PromptTooLongError, match=r"maximum context length is 20 tokens.*the prompt has 20") as error:
        Limits(**SIZES).final_length(make_request("a", [1] * 20, max_tokens=1))
    assert error.value.value == 20


def test_request_that_outgrows_the_whole_pool_is_refused_with_its_numbers(make_request):
    limits = Limits(**SIZES)
    assert limits.final_length(make_request("a", [1] * 10, max_tokens=6)) == 16  # 4 pages: all there are
    with pytest.raises(RequestTooLargeError, match="17 tokens, 5 pages of 4, but the KV pool has 4") as error:
        limits.final_length(make_request("a", [1] * 10, max_tokens=7))
    assert error.value.field == "max_tokens" and error.value.value == 7
