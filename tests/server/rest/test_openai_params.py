"""Bodies of the generation routes -> arguments of SamplingParams, prompts and conversations; without an engine."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import InvalidRequestError
from jaxserve.request import RequestDelta, RequestMetrics, SamplingParams
from server.errors import ServiceError
from server.frontend.frontend import CallOptions
from server.rest.answer import finish_reason, merged, timings
from server.rest.params import (
    REFUSED,
    SAMPLING_FIELDS,
    call_fields,
    chat_names,
    chat_sampling,
    completion_sampling,
    conversation_of,
    prompts_of,
    spelled,
)
from server.rest.types_chat import ChatRequest
from server.rest.types_completion import CompletionRequest
from server.rest.validation import validated

MESSAGES = [{"role": "user", "content": "hi"}]


def completion(**body: Any) -> CompletionRequest:
    return validated({"prompt": "hi", **body}, CompletionRequest)


def chat(**body: Any) -> ChatRequest:
    return validated({"messages": MESSAGES, **body}, ChatRequest)


def test_every_sampling_parameter_is_settable_by_both_routes() -> None:
    derived = {"max_tokens", "logprobs"}
    not_offered = {"detokenize"}  # an answer without text is not in OpenAI's API
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    assert set(SAMPLING_FIELDS) | derived == known - not_offered
    for type_ in (CompletionRequest, ChatRequest):
        assert known - not_offered <= set(type_.model_fields)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "n": st.integers(1, 128),
            "temperature": st.floats(0, 2),
            "top_p": st.floats(0.01, 1),
            "top_k": st.integers(-1, 100),
            "min_p": st.floats(0, 1),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "repetition_penalty": st.floats(0.5, 2),
            "seed": st.integers(-(2**63), 2**63 - 1),
            "stop": st.one_of(st.text(min_size=1), st.lists(st.text(min_size=1), max_size=16)),
            "stop_token_ids": st.lists(st.integers(0, 511), max_size=5),
            "include_stop_str_in_output": st.booleans(),
            "ignore_eos": st.booleans(),
            "min_tokens": st.integers(0, 16),
            "prompt_logprobs": st.integers(0, 20),
            "logit_bias": st.dictionaries(st.integers(0, 511).map(str), st.floats(-100, 100), max_size=4),
            "allowed_token_ids": st.lists(st.integers(0, 511), min_size=1, max_size=5),
            "bad_words": st.lists(st.text(min_size=1), max_size=5),
            "skip_special_tokens": st.booleans(),
            "spaces_between_special_tokens": st.booleans(),
        },
    )
)
def test_given_values_reach_sampling_params_unchanged(body: dict[str, Any]) -> None:
    expected = SamplingParams(**body)
    assert SamplingParams(**completion_sampling(completion(**body))) == expected
    assert SamplingParams(**chat_sampling(chat(**body))) == dataclasses.replace(expected, max_tokens=None)


def test_null_leaves_the_models_default() -> None:
    nulls = dict.fromkeys(SAMPLING_FIELDS)
    assert completion_sampling(completion(**nulls)) == {"max_tokens": 16}
    assert chat_sampling(chat(**nulls)) == {"max_tokens": None}


def test_false_and_zero_are_values_and_not_defaults() -> None:
    given = completion_sampling(completion(temperature=0, top_k=0, seed=0, skip_special_tokens=False, logprobs=0))
    assert given["temperature"] == 0 and given["top_k"] == 0 and given["seed"] == 0 and given["logprobs"] == 0
    assert given["skip_special_tokens"] is False


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 5}, 5),
    ],
)
def test_chat_logprobs_are_a_flag_and_a_number(body: dict[str, Any], expected: int | None) -> None:
    assert chat_sampling(chat(**body)).get("logprobs") == expected


def test_echo_with_logprobs_asks_for_those_of_the_prompt() -> None:
    assert completion_sampling(completion(echo=True, logprobs=3))["prompt_logprobs"] == 3
    assert completion_sampling(completion(echo=True, logprobs=3, prompt_logprobs=5))["prompt_logprobs"] == 5
    assert "prompt_logprobs" not in completion_sampling(completion(echo=True))


def test_call_fields_are_fields_of_call_options() -> None:
    body = completion(
        priority=-3, cache_salt="s", add_special_tokens=False, truncate_prompt_tokens=7, truncation_side="right"
    )
    options = CallOptions(endpoint="/v1/completions", **call_fields(body))
    assert (options.priority, options.cache_salt, options.add_special_tokens) == (-3, "s", False)
    assert (options.truncate_prompt_tokens, options.truncation_side) == (7, "right")
    assert set(call_fields(completion()).values()) == {None}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_four_kinds_of_prompt_become_a_list(prompt: Any, expected: list[Any]) -> None:
    assert prompts_of(completion(prompt=prompt)) == expected


@pytest.mark.parametrize("route", [completion, chat])
@pytest.mark.parametrize("value", [None, False, [], {}])
def test_refused_fields_may_say_that_they_want_nothing(route: Any, value: Any) -> None:
    for name, _ in REFUSED[type(route())]:
        if name == "store" and value not in (None, False):
            continue
        body = route(**{name: value})
        completion_sampling(body) if route is completion else chat_sampling(body)


@pytest.mark.parametrize("route", [completion, chat])
def test_refused_fields_are_refused_with_their_reason(route: Any) -> None:
    refused = REFUSED[type(route())]
    assert len(refused) > 10
    for name, why in refused:
        body = route(**{name: True})
        with pytest.raises(ServiceError) as raised:
            completion_sampling(body) if route is completion else chat_sampling(body)
        assert (raised.value.code, raised.value.param) == ("unsupported_parameter", name)
        assert why in str(raised.value)


def test_template_variables_reach_the_conversation() -> None:
    body = chat(
        chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low", verbosity="high", documents=[{"t": 1}]
    )
    assert conversation_of(body).template_kwargs == {
        "enable_thinking": False,
        "reasoning_effort": "low",
        "verbosity": "high",
        "documents": [{"t": 1}],
    }


def test_generation_prompt_is_added_unless_the_final_message_is_continued() -> None:
    assert conversation_of(chat()).add_generation_prompt
    assert not conversation_of(chat(add_generation_prompt=False)).add_generation_prompt
    continued = conversation_of(chat(continue_final_message=True))
    assert continued.continue_final_message and not continued.add_generation_prompt


def test_messages_reach_the_template_without_nulls() -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    messages = [
        {"role": "developer", "content": "be brief", "name": None},
        {"role": "assistant", "content": None, "tool_calls": calls, "audio": None, "annotations": [], "refusal": None},
        {"role": "tool", "content": "5", "tool_call_id": "c"},
    ]
    assert list(conversation_of(chat(messages=messages)).messages) == [
        {"role": "system", "content": "be brief"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "5", "tool_call_id": "c"},
    ]


def test_errors_name_the_field_as_the_client_spelled_it() -> None:
    names = chat_names(chat(max_completion_tokens=5))
    with pytest.raises(ServiceError) as raised, spelled(names):
        SamplingParams(max_tokens=0)
    assert raised.value.param == "max_completion_tokens"
    assert str(raised.value).startswith("max_completion_tokens=0 ")
    with pytest.raises(ServiceError) as raised, spelled({}):
        raise InvalidRequestError("n=0 must be 1", "n", 0)
    assert (raised.value.param, raised.value.code) == ("n", "invalid_value")


DELTAS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.builds(
            RequestDelta,
            index=st.integers(0, 2),
            text=st.text(max_size=3),
            token_ids=st.lists(st.integers(0, 9), max_size=3),
        ),
    ),
    max_size=12,
)


@given(DELTAS)
def test_merging_a_batch_loses_and_reorders_nothing(batch: list[tuple[int, RequestDelta]]) -> None:
    together = merged(batch)
    keys = [(position, delta.index) for position, delta in together]
    assert len(set(keys)) == len(keys), "one delta a sample"
    for position, index in {(position, delta.index) for position, delta in batch}:
        before = [delta for p, delta in batch if (p, delta.index) == (position, index)]
        after = dict(zip(keys, [delta for _, delta in together], strict=True))[position, index]
        assert after.text == "".join(delta.text for delta in before)
        assert after.token_ids == [token for delta in before for token in delta.token_ids]


def test_merged_delta_has_the_end_of_the_last_and_the_logprobs_of_all() -> None:
    first = RequestDelta(index=0, text="a", token_ids=[1], logprobs=[{}])
    last = RequestDelta(index=0, text="", token_ids=[2], logprobs=[{}], finish_reason="stop", stop_reason=2)
    [(_, delta)] = merged([(0, first), (0, last)])
    assert (delta.finish_reason, delta.stop_reason, delta.logprobs) == ("stop", 2, [{}, {}])


def test_timings_of_several_prompts_are_the_longest() -> None:
    slow = RequestMetrics(arrival_time=1.0, last_token_time=4.0, queue_time=0.5, time_to_first_token=1.0, preemptions=1)
    fast = RequestMetrics(arrival_time=1.0, last_token_time=2.0, queue_time=0.1, time_to_first_token=0.2)
    assert timings([fast, slow]) == {
        "queue_seconds": 0.5,
        "time_to_first_token_seconds": 1.0,
        "time_per_output_token_seconds": None,
        "total_seconds": 3.0,
        "preemptions": 1,
    }


def test_finish_reasons_are_openais() -> None:
    assert [finish_reason(ours) for ours in ("stop", "length", "abort", None)] == ["stop", "length", "stop", None]
