"""Between messages of jaxserve.v1 and the front end's types nothing is lost, and nothing unset becomes a zero."""

import dataclasses
import inspect
import math
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.client.requests import Requests
from jaxserve.client.results import chunk, completion
from jaxserve.engine.text_front import TextFront
from jaxserve.errors import InvalidRequestError
from jaxserve.request import (
    CompletionOutput,
    Logprob,
    RequestDelta,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)
from jaxserve.text.chat_prompt import encode_chat
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.v1 import inference_pb2 as pb
from server.errors import ServiceError
from server.frontend.frontend import CallOptions, Conversation
from server.frontend.prompts import RESERVED_VARIABLES
from server.rpc import convert
from server.rpc.convert import Call

CLIENT = Requests(model="", timeout=None, api_key=None)
CALL = Call(endpoint="Inference/Generate", request_id="abc")
IDS = st.lists(st.integers(0, 2**32 - 1), max_size=5)
WORDS = st.lists(st.text(min_size=1), max_size=3)
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, 128),
    "max_tokens": st.integers(100, 2**32 - 1),
    "min_tokens": st.integers(0, 100),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 2**31 - 1),
    "min_p": st.floats(0, 1),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 100),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": WORDS,
    "stop_token_ids": IDS,
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "logprobs": st.integers(0, 2**32 - 1),
    "prompt_logprobs": st.integers(0, 2**32 - 1),
    "logit_bias": st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-100, 100), min_size=1, max_size=5),
    "allowed_token_ids": st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=5),
    "bad_words": WORDS,
    "detokenize": st.just(True),  # without text there can be no stop strings
    "skip_special_tokens": st.booleans(),
    "spaces_between_special_tokens": st.booleans(),
}


def received(message: Any) -> Any:
    """As the other side gets it."""
    return type(message).FromString(message.SerializeToString())


def test_every_sampling_parameter_has_a_field() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == set(pb.SamplingParams.DESCRIPTOR.fields_by_name) == SAMPLING.keys()


@given(st.fixed_dictionaries({}, optional=SAMPLING))
def test_sampling_parameters_arrive_as_they_were_given(options: dict[str, Any]) -> None:
    message = CLIENT.generate(pb.GenerateRequest, "x", None, options)
    arrived = SamplingParams(**convert.given_sampling(received(message).sampling))
    assert arrived == SamplingParams(**{"max_tokens": None, **options})


@given(st.fixed_dictionaries({}, optional=SAMPLING))
def test_sampling_params_object_arrives_whole(options: dict[str, Any]) -> None:
    params = SamplingParams(**{"max_tokens": None, **options})
    message = received(CLIENT.generate(pb.GenerateRequest, "x", params, {}))
    given = convert.given_sampling(message.sampling)
    assert SamplingParams(**given) == params
    scalars = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields if field.has_presence}
    unset = {name for name in scalars if getattr(params, name) is None}
    assert scalars - unset <= given.keys()  # a model's own defaults cannot come in between


def test_what_is_not_set_is_left_to_the_model() -> None:
    assert convert.given_sampling(pb.SamplingParams()) == {"max_tokens": None}


def test_a_zero_that_was_set_is_no_default() -> None:
    message = pb.SamplingParams(temperature=0.0, top_k=0, logprobs=0, ignore_eos=False)
    expected = {"max_tokens": None, "temperature": 0.0, "top_k": 0, "logprobs": 0, "ignore_eos": False}
    assert convert.given_sampling(received(message)) == expected


def test_developer_is_the_templates_system() -> None:
    assert convert.chat_messages([pb.Message(role="developer", content="a")]) == [{"role": "system", "content": "a"}]


def test_no_variable_can_pass_for_an_argument_on_the_way_to_the_template() -> None:
    named = set()
    for function in (TextFront.encode_chat, encode_chat, ChatTemplate.render):
        parameters = inspect.signature(function).parameters.values()
        named |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    own = named - {"documents"}  # the client's to give
    assert own <= RESERVED_VARIABLES


def test_prompts_are_told_apart() -> None:
    messages = [{"role": "user", "content": "", "name": "a"}, {"role": "assistant", "content": "b"}]
    for prompt in ("", "text", [], [1, 2]):
        message = received(CLIENT.generate(pb.GenerateRequest, prompt, None, {}))
        assert convert.generate_prompt(message) == prompt
    message = received(CLIENT.generate(pb.GenerateRequest, messages, None, {}))
    assert convert.generate_prompt(message) == Conversation(messages=messages)


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [(pb.GenerateRequest, "text, token_ids, messages"), (pb.TokenizeRequest, "text, messages")],
)
def test_missing_prompt_is_told_with_what_it_can_be(kind: Any, kinds: str) -> None:
    with pytest.raises(ServiceError, match=f"give one of {kinds}$") as raised:
        convert.generate_prompt(kind())
    assert (raised.value.code, raised.value.param) == ("missing_required_parameter", "prompt")


@pytest.mark.parametrize(
    ("flags", "opens"),
    [({}, True), ({"continue_final_message": True}, False), ({"add_generation_prompt": False}, False)],
)
def test_assistants_header_is_added_unless_the_last_message_goes_on(flags: dict[str, bool], opens: bool) -> None:
    message = CLIENT.chat(pb.ChatRequest, [{"role": "user", "content": "a"}], None, flags)
    assert convert.conversation(message, message.messages).add_generation_prompt is opens


def test_contradiction_is_left_for_the_template_to_refuse() -> None:
    message = pb.ChatRequest(add_generation_prompt=True, continue_final_message=True)
    prompt = convert.conversation(message, [])
    assert prompt.add_generation_prompt and prompt.continue_final_message


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


NAMES = st.text().filter(lambda name: name not in RESERVED_VARIABLES)


@given(st.dictionaries(NAMES, JSON, max_size=3))
def test_template_variables_arrive_as_they_were_given(variables: dict[str, Any]) -> None:
    message = received(CLIENT.chat(pb.ChatRequest, [], None, {"chat_template_kwargs": variables}))
    assert convert.template_kwargs(message.chat_template_kwargs) == variables


def test_whole_numbers_are_printed_without_a_point() -> None:
    message = Struct()
    message.update({"count": 3, "share": 0.5, "list": [1, {"two": 2}]})
    assert repr(convert.template_kwargs(message)["list"]) == "[1, {'two': 2}]"
    assert str(convert.template_kwargs(message)["count"]) == "3"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_template_variable_that_is_no_json_number_is_refused(number: float) -> None:
    message = Struct()
    message.update({"a": [number]})
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs"):
        convert.template_kwargs(message)


def test_options_arrive_as_they_were_given() -> None:
    options = {
        "priority": -3,
        "cache_salt": "pepper",
        "add_special_tokens": False,
        "truncate_prompt_tokens": -1,
        "truncation_side": "right",
    }
    message = received(CLIENT.generate(pb.GenerateRequest, "x", None, options))
    call = Call(endpoint="Inference/Chat", request_id="abc", timeout=2.5, traceparent="00-1-2-3")
    assert convert.call_options(message.options, call) == CallOptions(
        endpoint="Inference/Chat", timeout=2.5, client_request_id="abc", traceparent="00-1-2-3", **options
    )


def test_options_that_are_not_set_are_the_defaults() -> None:
    expected = CallOptions(endpoint="Inference/Generate", client_request_id="abc")
    assert convert.call_options(pb.RequestOptions(), CALL) == expected


def test_deadline_that_has_passed_is_told_as_one() -> None:
    with pytest.raises(ServiceError) as raised:
        convert.call_options(pb.RequestOptions(), dataclasses.replace(CALL, timeout=0.0))
    assert raised.value.code == "deadline_exceeded"


def test_truncation_side_of_a_newer_client_is_refused() -> None:
    with pytest.raises(ServiceError, match="truncation_side=7") as raised:
        convert.call_options(pb.RequestOptions(truncation_side=7), CALL)
    assert raised.value.code == "invalid_value"


TOKENS = st.integers(0, 50)
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]))  # protobuf carries no surrogates


@st.composite
def positions(draw: st.DrawFn, num_top: int) -> dict[int, Logprob]:
    """As the engine's assembler makes them: the chosen token, then the likeliest ones by rank."""
    top = draw(st.lists(TOKENS, min_size=num_top, max_size=num_top, unique=True))
    ranked = {token: Logprob(-1.0 * rank, rank, draw(CHARACTERS)) for rank, token in enumerate(top, start=1)}
    chosen = draw(TOKENS)
    return {chosen: ranked.get(chosen, Logprob(-100.0, num_top + 7, draw(CHARACTERS))), **ranked}


@st.composite
def samples(draw: st.DrawFn, kind: type[Any], index: int, num_top: int | None) -> Any:
    ids = draw(st.lists(TOKENS, min_size=1, max_size=4))
    reason = draw(st.sampled_from([None, "stop", "length"]))
    logprobs = None if num_top is None else [draw(positions(num_top)) for _ in ids]
    more = {}
    if kind is CompletionOutput and logprobs is not None:
        more["cumulative_logprob"] = math.fsum(entry[next(iter(entry))].logprob for entry in logprobs)
    return kind(
        index=index,
        text=draw(CHARACTERS),
        token_ids=ids,
        logprobs=logprobs,
        finish_reason=reason,
        stop_reason=draw(st.none() | TOKENS | CHARACTERS) if reason == "stop" else None,
        **more,
    )


@given(st.data(), st.none() | st.integers(0, 4))
def test_completions_reach_the_client_unchanged(data: st.DataObject, num_top: int | None) -> None:
    params = SamplingParams(logprobs=num_top)
    outputs = [data.draw(samples(CompletionOutput, index, num_top)) for index in range(2)]
    choices = [convert.choice(output, params) for output in outputs]
    assert list(completion(received(pb.GenerateResponse(choices=choices))).outputs) == outputs


@given(st.data(), st.none() | st.integers(0, 4))
def test_deltas_reach_the_client_unchanged(data: st.DataObject, num_top: int | None) -> None:
    params = SamplingParams(logprobs=num_top)
    deltas = [data.draw(samples(RequestDelta, index, num_top)) for index in range(2)]
    choices = convert.choices(deltas, params)
    assert list(chunk(received(pb.GenerateStreamResponse(choices=choices))).deltas) == deltas


def test_the_likeliest_tokens_hold_the_chosen_one_only_where_it_is_among_them() -> None:
    likely = {7: Logprob(-0.5, 1, "a"), 9: Logprob(-1.5, 2, "b")}
    [inside, outside] = convert.positions([{9: likely[9], **likely}, {3: Logprob(-8.0, 40, "c"), **likely}], 2)
    assert (inside.chosen.token_id, [token.token_id for token in inside.top]) == (9, [7, 9])
    assert (outside.chosen.token_id, [token.token_id for token in outside.top]) == (3, [7, 9])
    [alone] = convert.positions([{3: Logprob(-8.0, 1, "c")}], 0)
    assert (alone.chosen.token_id, len(alone.top)) == (3, 0)


def test_deltas_of_one_sample_become_one_choice() -> None:
    params = SamplingParams(logprobs=0)
    deltas = [
        RequestDelta(index=1, text="", token_ids=[4], logprobs=[{4: Logprob(-1.0, 1, "")}]),
        RequestDelta(index=0, text="x", token_ids=[6], logprobs=[{6: Logprob(-2.0, 1, "x")}]),
        RequestDelta(
            index=1,
            text="ab",
            token_ids=[5],
            logprobs=[{5: Logprob(-3.0, 1, "ab")}],
            finish_reason="stop",
            stop_reason=5,
        ),
        RequestDelta(index=0, text="y", token_ids=[], logprobs=[]),
    ]
    second, first = convert.choices(deltas, params)
    assert (second.index, second.text, list(second.token_ids), second.stop_token_id) == (1, "ab", [4, 5], 5)
    assert [position.chosen.logprob for position in second.logprobs] == [-1.0, -3.0]
    assert second.finish_reason == pb.FINISH_REASON_STOP
    assert (first.index, first.text, list(first.token_ids)) == (0, "xy", [6])
    assert first.finish_reason == pb.FINISH_REASON_UNSPECIFIED


def test_cause_of_an_abort_is_no_stop_string() -> None:
    output = CompletionOutput(index=0, text="", token_ids=[], finish_reason="abort", stop_reason="aborted")
    message = convert.choice(output, SamplingParams())
    assert (message.finish_reason, message.WhichOneof("stop_reason")) == (pb.FINISH_REASON_ABORT, None)


def test_usage_counts_all_samples() -> None:
    outputs = [CompletionOutput(index=i, text="", token_ids=[1] * (i + 1)) for i in range(3)]
    output = RequestOutput(
        request_id="a", prompt=None, prompt_token_ids=[1, 2], outputs=outputs, finished=True, num_cached_tokens=1
    )
    assert convert.usage(output) == pb.Usage(prompt_tokens=2, completion_tokens=6, total_tokens=8, cached_tokens=1)


def test_timings_never_reached_are_not_set() -> None:
    metrics = RequestMetrics(arrival_time=0.0, queue_time=0.0)
    output = RequestOutput(
        request_id="a", prompt=None, prompt_token_ids=[1], outputs=[], finished=True, metrics=metrics
    )
    message = convert.timings(output)
    assert message.HasField("queue_seconds") and message.queue_seconds == 0
    assert not message.HasField("time_to_first_token_seconds")
    assert message.total_seconds > 0


def test_half_characters_of_a_tokenizer_cross_as_question_marks() -> None:
    output = CompletionOutput(index=0, text="a\ud800", token_ids=[1], logprobs=[{1: Logprob(-1.0, 1, "\udfff")}])
    message = received(convert.choice(output, SamplingParams(logprobs=0)))
    assert (message.text, message.logprobs[0].chosen.token) == ("a?", "?")
