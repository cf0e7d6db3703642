"""Nothing is lost between a front end and the core, and instants mean the same at both ends."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.internal.v1 import tokens_pb2 as pb
from jaxserve.request import Request, SampleProgress, SamplingParams, TokenLogprobs, TokenOutput
from server.core.wire import output_from_wire, output_to_wire, request_from_wire, request_to_wire

tokens = st.integers(0, 2**31)
ids = st.lists(tokens, max_size=8)
floats = st.floats(-100, 0)
# Stop strings, bad words as text and how text is made stay at the front end.
params = st.builds(
    SamplingParams,
    n=st.integers(1, 4),
    max_tokens=st.none() | st.integers(8, 10_000),
    min_tokens=st.integers(0, 8),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 10_000),
    min_p=st.floats(0, 1),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 100),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=ids,
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    logit_bias=st.none() | st.dictionaries(tokens, st.floats(-100, 100), min_size=1, max_size=4),
    allowed_token_ids=st.none() | st.lists(tokens, min_size=1, max_size=8),
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    chosen = draw(params)
    progress = ()
    if draw(st.booleans()):
        progress = tuple(SampleProgress(tuple(draw(ids)), draw(st.booleans())) for _ in range(chosen.n))
    return Request(
        id=draw(st.text(max_size=20)),
        prompt_token_ids=draw(ids),
        params=chosen,
        eos_token_ids=tuple(draw(ids)),
        bad_word_token_ids=tuple(tuple(word) for word in draw(st.lists(ids, max_size=3))),
        cache_salt=draw(st.text(max_size=10)),
        priority=draw(st.integers(-(2**31), 2**31 - 1)),
        progress=progress,
        prompt_logprobs_sent=draw(st.integers(0, 100)),
    )


@given(requests(), st.none() | st.floats(0.5, 1e6), st.floats(0, 1e6))
def test_request_arrives_as_it_was_sent(request_, timeout, age):
    import time

    now = time.monotonic()
    sent = dataclasses.replace(request_, arrival_time=now - age, deadline=None if timeout is None else now + timeout)
    data = request_to_wire(sent, now).SerializeToString()
    arrived = request_from_wire(pb.EngineRequest.FromString(data))
    assert arrived.arrival_time == pytest.approx(sent.arrival_time, abs=1.0)
    assert (arrived.deadline is None) == (sent.deadline is None)
    if sent.deadline is not None:
        assert arrived.deadline == pytest.approx(sent.deadline, abs=1.0)
    assert dataclasses.replace(arrived, arrival_time=0.0, deadline=None) == request_


def test_counts_beyond_the_wire_mean_without_bound():
    huge = SamplingParams(max_tokens=10**30, top_k=10**30)
    arrived = request_from_wire(request_to_wire(Request(id="a", prompt_token_ids=[1], params=huge), 0.0))
    assert arrived.params.max_tokens == 2**32 - 1
    assert arrived.params.top_k == 2**31 - 1


logprobs = st.builds(TokenLogprobs, tokens, floats, st.integers(1, 2**31), ids, st.lists(floats, max_size=8))
outputs = st.builds(
    TokenOutput,
    request_id=st.text(max_size=20),
    index=st.integers(0, 127),
    token_ids=ids,
    logprobs=st.none() | st.lists(logprobs, min_size=1, max_size=3),
    prompt_logprobs=st.none() | st.lists(logprobs, min_size=1, max_size=3),
    finish_reason=st.sampled_from([None, "stop", "length", "abort", "error"]),
    stop_reason=st.none() | tokens | st.text(max_size=20),
    cached_tokens=st.integers(0, 2**31),
    preemptions=st.integers(0, 2**31),
    scheduled_time=st.none() | st.floats(0, 1e9),
)


@given(outputs)
def test_output_arrives_as_it_was_sent(output):
    data = output_to_wire(output).SerializeToString()
    assert output_from_wire(pb.SampleOutput.FromString(data), 0.0) == output


def test_instants_of_another_clock_are_moved_to_this_one():
    output = TokenOutput(request_id="a", index=0, token_ids=[], scheduled_time=100.0)
    assert output_from_wire(output_to_wire(output), 23.5).scheduled_time == 123.5
