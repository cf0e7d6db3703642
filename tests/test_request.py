"""SamplingParams refuses every invalid value where it is written, and says which field and value it was."""

import dataclasses
import math

import pytest

from jaxserve.errors import InvalidRequestError, JaxserveError
from jaxserve.request import MAX_BAD_WORDS, MAX_SAMPLES, MAX_STOP_STRINGS, SamplingParams

NAN, INF, HUGE = math.nan, math.inf, 10**400  # HUGE has no float
INTS = ["n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"]
FLOATS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
FLAGS = [
    "include_stop_str_in_output",
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
]
LISTS = ["stop", "bad_words", "stop_token_ids", "allowed_token_ids", "logit_bias"]

INVALID = [
    *((name, value) for name in INTS for value in (True, 1.0, "1", NAN, [1])),
    *((name, value) for name in FLOATS for value in (True, "0.5", None, NAN, INF, -INF, HUGE, [0.5])),
    *((name, value) for name in FLAGS for value in (1, 0, None, "true")),
    ("n", 0),
    ("n", -1),
    ("n", MAX_SAMPLES + 1),
    ("n", HUGE),
    ("n", None),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("min_tokens", -1),
    ("min_tokens", 17),  # above the default max_tokens
    ("min_tokens", HUGE),
    ("min_tokens", None),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("top_p", 0.0),
    ("top_p", -0.1),
    ("top_p", 1.0001),
    ("top_k", -2),
    ("top_k", None),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("presence_penalty", -2.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("logprobs", -1),
    ("prompt_logprobs", -1),
]
# Values of collections, and the part of them that is to blame.
INVALID_PARTS = [
    ("stop", "", ""),
    ("stop", ["a", ""], ""),
    ("stop", [1], 1),
    ("stop", [None], None),
    ("bad_words", [""], ""),
    ("bad_words", [b"x"], b"x"),
    ("stop_token_ids", [-1], -1),
    ("stop_token_ids", [1, True], True),
    ("stop_token_ids", [1.0], 1.0),
    ("stop_token_ids", ["1"], "1"),
    ("allowed_token_ids", [], ()),
    ("allowed_token_ids", [-1], -1),
    ("allowed_token_ids", [False], False),
    ("logit_bias", {-1: 0.0}, -1),
    ("logit_bias", {"x": 0.0}, "x"),
    ("logit_bias", {None: 0.0}, None),
    ("logit_bias", {1: 101}, 101),
    ("logit_bias", {1: -100.5}, -100.5),
    ("logit_bias", {1: INF}, INF),
    ("logit_bias", {1: True}, True),
    ("logit_bias", {1: "2"}, "2"),
    ("logit_bias", {1: HUGE}, HUGE),
    ("logit_bias", {1.7: 2.0}, 1.7),  # not token 1
    ("logit_bias", {INF: 2.0}, INF),
    ("logit_bias", {True: 2.0}, True),
]


def name_of(value):
    text = f"{type(value).__name__}-{value}"
    return text if len(text) < 40 else text[:40]


def refused(name, value):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    return caught.value


def same(found, value):
    return type(found) is type(value) and (found == value or (found != found and value != value))


@pytest.mark.parametrize(("name", "value"), INVALID, ids=lambda v: name_of(v) if not isinstance(v, str) else v)
def test_invalid_value_is_refused_by_field_and_value(name, value):
    error = refused(name, value)
    assert error.field == name and same(error.value, value)
    assert name in str(error) and (repr(value) in str(error) or value is HUGE)
    assert isinstance(error, ValueError) and isinstance(error, JaxserveError)


@pytest.mark.parametrize(
    ("name", "value", "part"), INVALID_PARTS, ids=lambda v: v if isinstance(v, str) else name_of(v)
)
def test_invalid_part_of_a_collection_is_refused_by_field_and_part(name, value, part):
    error = refused(name, value)
    assert error.field == name and same(error.value, part)
    assert name in str(error) and (repr(part) in str(error) or part is HUGE)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("value", [5, 0, False, 1.5], ids=name_of)
def test_what_is_no_collection_is_refused(name, value):
    error = refused(name, value)
    assert error.field == name and name in str(error) and repr(value) in str(error)


@pytest.mark.parametrize("value", ["words", [1, 2]], ids=name_of)
def test_logit_bias_that_is_no_mapping_is_refused(value):
    assert refused("logit_bias", value).field == "logit_bias"


@pytest.mark.parametrize("name", ["n", "max_tokens", "min_tokens", "top_k", "seed"])
def test_integer_with_more_digits_than_python_prints_is_refused(name):
    """Python refuses to print integers of more than 4300 digits, so not even the error may try."""
    value = -(10**5000) if name in ("max_tokens", "top_k") else 10**5000
    assert refused(name, value).field == name


def test_repetition_penalty_is_refused_where_float32_has_no_such_number():
    for value in (1e300, 1e-300):
        assert refused("repetition_penalty", value).field == "repetition_penalty"


def test_too_many_strings_are_refused_with_the_limit():
    for name, limit in (("stop", MAX_STOP_STRINGS), ("bad_words", MAX_BAD_WORDS)):
        assert len(getattr(SamplingParams(**{name: ["x"] * limit}), name)) == limit
        error = refused(name, ["x"] * (limit + 1))
        assert error.field == name and str(limit) in str(error) and str(limit + 1) in str(error)


def test_min_tokens_above_max_tokens_is_refused_with_both():
    with pytest.raises(InvalidRequestError, match="min_tokens=3.*max_tokens=2") as caught:
        SamplingParams(min_tokens=3, max_tokens=2)
    assert (caught.value.field, caught.value.value) == ("min_tokens", 3)
    assert SamplingParams(min_tokens=3, max_tokens=None).min_tokens == 3


def test_stop_strings_need_text():
    with pytest.raises(InvalidRequestError, match="detokenize") as caught:
        SamplingParams(stop="x", detokenize=False)
    assert caught.value.field == "stop"


def test_long_value_is_shortened_in_the_message():
    assert len(str(refused("temperature", "x" * 10_000))) < 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1),
        ("n", MAX_SAMPLES),
        ("max_tokens", 1),
        ("max_tokens", None),
        ("temperature", 0),
        ("temperature", 2.0),
        ("top_p", 1),
        ("top_p", 1e-30),
        ("top_k", -1),
        ("top_k", 0),
        ("top_k", 1),
        ("min_p", 0),
        ("min_p", 1),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 10),
        ("seed", 2**63 - 1),
        ("seed", -(2**63)),
        ("seed", None),
        ("logprobs", 0),
        ("prompt_logprobs", 0),
    ],
)
def test_limits_themselves_are_accepted(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_defaults_sample_from_the_untouched_distribution():
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.min_tokens) == (1, 16, 0)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert params.seed is params.logprobs is params.prompt_logprobs is params.logit_bias is None
    assert params.allowed_token_ids is None and not params.greedy
    assert params.stop == params.bad_words == params.stop_token_ids == ()


def test_params_are_frozen():
    params = SamplingParams()
    for field in dataclasses.fields(params):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(params, field.name, None)


def test_params_keep_nothing_of_the_callers_collections():
    stop, ids, bias = ["x"], [1], {"3": 1}
    params = SamplingParams(stop=stop, stop_token_ids=ids, allowed_token_ids=ids, bad_words=stop, logit_bias=bias)
    stop.append("y"), ids.append(2), bias.clear()
    assert params.stop == params.bad_words == ("x",)
    assert params.stop_token_ids == params.allowed_token_ids == (1,)
    assert params.logit_bias == {3: 1.0}


def test_params_copied_with_replace_are_equal():
    params = SamplingParams(stop="x", logit_bias={1: 2}, allowed_token_ids=[4], bad_words=["b"], stop_token_ids=[7])
    assert dataclasses.replace(params) == params
    with pytest.raises(InvalidRequestError):
        dataclasses.replace(params, n=0)


def test_single_stop_string_is_one_string_not_its_letters():
    assert SamplingParams(stop="abc").stop == ("abc",)


def test_greedy_is_temperature_below_what_can_be_divided_by():
    assert SamplingParams(temperature=0).greedy and SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy
