"""The methods of jaxserve.v1.Inference on a live server with the tiny model."""

import time
from typing import Any

import grpc
import pytest

from jaxserve.request import SamplingParams
from jaxserve.v1 import inference_pb2 as pb
from jaxserve.v1.inference_pb2_grpc import InferenceStub

CHAT = [pb.Message(role="user", content="The quick brown fox")]


def joined(answers: list[Any]) -> list[pb.Choice]:
    """What the messages of a stream add up to, by sample."""
    samples: dict[int, pb.Choice] = {}
    for answer in answers:
        indices = [choice.index for choice in answer.choices]
        assert len(indices) == len(set(indices)), "one choice a sample"
        for new in answer.choices:
            old = samples.setdefault(new.index, pb.Choice(index=new.index))
            assert old.finish_reason == pb.FINISH_REASON_UNSPECIFIED, "nothing after the end"
            text = old.text + new.text
            old.MergeFrom(new)
            old.text = text
    return [samples[index] for index in sorted(samples)]


SAMPLINGS = {
    "greedy": pb.SamplingParams(temperature=0, max_tokens=40),
    "seeded": pb.SamplingParams(temperature=1.5, seed=7, max_tokens=40),
    "four": pb.SamplingParams(n=4, seed=3, max_tokens=20),
    "logprobs": pb.SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=2),
    "ids": pb.SamplingParams(temperature=0, max_tokens=12, detokenize=False),
    "to the end": pb.SamplingParams(temperature=0, ignore_eos=True),
    "stop id": pb.SamplingParams(temperature=0, max_tokens=40, stop_token_ids=range(256, 512)),
    "stop string": pb.SamplingParams(temperature=0, max_tokens=200, stop=["e", "o", "a"]),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_streamed_answer_equals_unary_answer(stub: InferenceStub, live: Any, sampling: pb.SamplingParams) -> None:
    options = pb.RequestOptions(return_prompt_token_ids=True)
    common: dict[str, Any] = {"text": "The quick brown fox", "sampling": sampling, "options": options}
    live.llm.reset_prefix_cache()
    whole = stub.Generate(pb.GenerateRequest(**common))
    live.llm.reset_prefix_cache()
    pieces = list(stub.GenerateStream(pb.GenerateStreamRequest(**common)))
    assert joined(pieces) == list(whole.choices)
    assert pieces[-1].usage == whole.usage
    assert pieces[-1].prompt_logprobs == whole.prompt_logprobs
    assert pieces[0].prompt_token_ids == whole.prompt_token_ids != []
    assert all(choice.finish_reason for choice in whole.choices)
    last, earlier = pieces[-1], pieces[:-1]
    assert last.HasField("usage") and last.HasField("timings")
    assert not any(piece.HasField("usage") or piece.HasField("timings") for piece in earlier)
    assert {piece.id for piece in pieces} == {last.id} != {whole.id}


def test_streamed_chat_equals_unary_chat(stub: InferenceStub) -> None:
    sampling = pb.SamplingParams(temperature=0, max_tokens=30)
    whole = stub.Chat(pb.ChatRequest(messages=CHAT, sampling=sampling))
    pieces = list(stub.ChatStream(pb.ChatStreamRequest(messages=CHAT, sampling=sampling)))
    assert joined(pieces) == list(whole.choices)


def test_messages_as_a_prompt_are_a_chat(stub: InferenceStub) -> None:
    sampling = pb.SamplingParams(temperature=0, max_tokens=30)
    chat = stub.Chat(pb.ChatRequest(messages=CHAT, sampling=sampling))
    prompt = stub.Generate(pb.GenerateRequest(messages=pb.Messages(messages=CHAT), sampling=sampling))
    assert prompt.choices == chat.choices


def test_answer_is_what_the_engine_says(stub: InferenceStub, live: Any) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20)
    [expected] = live.llm.generate(["The quick brown fox"], params)
    answer = stub.Generate(
        pb.GenerateRequest(text="The quick brown fox", sampling=pb.SamplingParams(temperature=0, max_tokens=20))
    )
    assert (answer.choices[0].text, list(answer.choices[0].token_ids)) == (
        expected.outputs[0].text,
        expected.outputs[0].token_ids,
    )
    assert answer.model == live.model
    assert abs(answer.created - time.time()) < 600
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert 0 <= answer.timings.queue_seconds <= answer.timings.time_to_first_token_seconds
    assert answer.timings.time_to_first_token_seconds <= answer.timings.total_seconds


def test_text_and_its_token_ids_give_the_same_answer(stub: InferenceStub) -> None:
    sampling = pb.SamplingParams(temperature=0, max_tokens=10)
    ids = stub.Tokenize(pb.TokenizeRequest(text="The quick brown fox")).token_ids
    by_text = stub.Generate(pb.GenerateRequest(text="The quick brown fox", sampling=sampling))
    by_ids = stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling))
    assert by_text.choices == by_ids.choices


def test_answer_without_max_tokens_goes_up_to_the_context(stub: InferenceStub) -> None:
    answer = stub.Generate(pb.GenerateRequest(text="The", sampling=pb.SamplingParams(ignore_eos=True)))
    limit = stub.GetModel(pb.GetModelRequest()).model.max_model_len
    assert answer.usage.total_tokens == limit
    assert answer.choices[0].finish_reason == pb.FINISH_REASON_LENGTH


def test_unset_parameters_take_the_models_own_defaults(stub: InferenceStub) -> None:
    """The tiny model names temperature 0.7 and top_k 40."""
    named = pb.SamplingParams(seed=5, max_tokens=30, temperature=0.7, top_k=40)
    unset = pb.SamplingParams(seed=5, max_tokens=30)
    other = pb.SamplingParams(seed=5, max_tokens=30, temperature=1.0, top_k=0)
    answers = [stub.Generate(pb.GenerateRequest(text="The", sampling=each)).choices for each in (named, unset, other)]
    assert answers[0] == answers[1] != answers[2]


def test_logprobs_are_the_chosen_token_and_the_likeliest(stub: InferenceStub) -> None:
    sampling = pb.SamplingParams(temperature=1.8, seed=1, max_tokens=20, logprobs=2)
    [choice] = stub.Generate(pb.GenerateRequest(text="The", sampling=sampling)).choices
    assert [position.chosen.token_id for position in choice.logprobs] == list(choice.token_ids)
    for position in choice.logprobs:
        assert [token.rank for token in position.top] == [1, 2]
        assert position.top[0].logprob >= position.top[1].logprob
        assert position.chosen.logprob <= position.top[0].logprob
    assert any(position.chosen.rank > 2 for position in choice.logprobs)


def test_stop_reason_names_what_was_found(stub: InferenceStub) -> None:
    greedy = pb.SamplingParams(temperature=0, max_tokens=20)
    free = stub.Generate(pb.GenerateRequest(text="The", sampling=greedy)).choices[0]
    by_id = pb.SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[free.token_ids[3]])
    stopped = stub.Generate(pb.GenerateRequest(text="The", sampling=by_id)).choices[0]
    assert (stopped.finish_reason, stopped.stop_token_id) == (pb.FINISH_REASON_STOP, free.token_ids[3])
    letter = free.text[-1]
    by_text = pb.SamplingParams(temperature=0, max_tokens=20, stop=[letter])
    stopped = stub.Generate(pb.GenerateRequest(text="The", sampling=by_text)).choices[0]
    assert (stopped.finish_reason, stopped.stop_string) == (pb.FINISH_REASON_STOP, letter)
    assert stopped.text == free.text[: free.text.index(letter)]


def test_prefix_is_found_under_the_same_salt_only(stub: InferenceStub, live: Any) -> None:
    live.llm.reset_prefix_cache()

    def cached(salt: str) -> int:
        options = pb.RequestOptions(cache_salt=salt)
        sampling = pb.SamplingParams(max_tokens=1)
        request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(60)), options=options, sampling=sampling)
        return stub.Generate(request).usage.cached_tokens

    assert cached("a") == 0
    assert cached("a") > 0
    assert cached("b") == 0


@pytest.mark.parametrize(
    ("side", "kept"),
    [
        (pb.TRUNCATION_SIDE_UNSPECIFIED, range(295, 300)),
        (pb.TRUNCATION_SIDE_LEFT, range(295, 300)),
        (pb.TRUNCATION_SIDE_RIGHT, range(5)),
    ],
)
def test_prompt_is_cut_on_the_side_that_was_asked_for(stub: InferenceStub, side: Any, kept: range) -> None:
    options = pb.RequestOptions(truncate_prompt_tokens=5, truncation_side=side, return_prompt_token_ids=True)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=range(300)), options=options, sampling=pb.SamplingParams(max_tokens=1)
    )
    assert stub.Generate(request).prompt_token_ids == list(kept)


def test_prompt_is_cut_to_the_context_where_that_was_asked_for(stub: InferenceStub) -> None:
    options = pb.RequestOptions(truncate_prompt_tokens=-1)
    answer = stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(300)), options=options))
    assert answer.usage.total_tokens == stub.GetModel(pb.GetModelRequest()).model.max_model_len


def test_final_message_is_continued_where_that_was_asked_for(stub: InferenceStub) -> None:
    messages = [*CHAT, pb.Message(role="assistant", content="jumps over")]
    options = pb.RequestOptions(return_prompt_token_ids=True)
    request = pb.ChatRequest(
        messages=messages, continue_final_message=True, options=options, sampling=pb.SamplingParams(max_tokens=1)
    )
    ids = stub.Chat(request).prompt_token_ids
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=ids)).text.endswith("assistant\njumps over")


def test_tokenize_and_detokenize_are_inverse(stub: InferenceStub, live: Any) -> None:
    text = "The quick <|end|> Zwei Sätze äöü. 日本語 😀"
    answer = stub.Tokenize(pb.TokenizeRequest(text=text, return_token_strs=True))
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=answer.token_ids)).text == text
    assert len(answer.token_strs) == len(answer.token_ids)
    assert answer.token_strs[0] == "The"
    assert answer.max_model_len == 256
    assert not stub.Tokenize(pb.TokenizeRequest(text=text)).token_strs


def test_tokenize_renders_messages(stub: InferenceStub) -> None:
    def text(**flags: bool) -> str:
        request = pb.TokenizeRequest(messages=pb.Messages(messages=CHAT), **flags)
        return stub.Detokenize(pb.DetokenizeRequest(token_ids=stub.Tokenize(request).token_ids)).text

    bare = "<|start|>user\nThe quick brown fox<|end|>\n"
    assert text() == bare + "<|start|>assistant\n"
    assert text(add_generation_prompt=False) == bare
    assert text(continue_final_message=True) == "<|start|>user\nThe quick brown fox"


def test_models_are_listed_by_every_name(start_live: Any, connect: Any) -> None:
    live = start_live(served_model_name=("first", "second"))
    stub = connect(live.grpc)
    models = stub.ListModels(pb.ListModelsRequest()).models
    assert [model.id for model in models] == ["first", "second"]
    assert {(model.owned_by, model.max_model_len, model.root) for model in models} == {
        ("jaxserve", 256, live.frontend.model_root)
    }
    assert stub.GetModel(pb.GetModelRequest()).model == models[0]
    assert stub.GetModel(pb.GetModelRequest(model="second")).model == models[1]
    asked = pb.GenerateRequest(model="second", text="a", sampling=pb.SamplingParams(max_tokens=1))
    assert stub.Generate(asked).model == "second"


def test_abort_ends_a_stream_from_another_connection(live: Any, stub: InferenceStub, connect: Any) -> None:
    sampling = pb.SamplingParams(n=4, ignore_eos=True)
    stream = stub.GenerateStream(pb.GenerateStreamRequest(text="The", sampling=sampling))
    pieces = [next(stream)]
    connect(live.grpc).Abort(pb.AbortRequest(id=pieces[0].id))
    pieces += stream
    reasons = {choice.finish_reason for choice in joined(pieces)}
    assert reasons <= {pb.FINISH_REASON_ABORT, pb.FINISH_REASON_LENGTH}
    assert pieces[-1].HasField("usage")


def test_abort_of_an_unknown_id_is_ignored(stub: InferenceStub) -> None:
    assert stub.Abort(pb.AbortRequest(id="gen-nobody")) == pb.AbortResponse()


@pytest.mark.parametrize("sent", ["mine-1.2:3_4", "x" * 128])
def test_request_id_comes_back(stub: InferenceStub, sent: str) -> None:
    metadata = (("x-request-id", sent),)
    _, unary = stub.ListModels.with_call(pb.ListModelsRequest(), metadata=metadata)
    assert dict(unary.initial_metadata())["x-request-id"] == sent
    request = pb.GenerateStreamRequest(text="The", sampling=pb.SamplingParams(max_tokens=1))
    stream = stub.GenerateStream(request, metadata=metadata)
    assert dict(stream.initial_metadata())["x-request-id"] == sent
    list(stream)


@pytest.mark.parametrize("sent", [(), ("a b",), ("x" * 129,), ("",), ("one", "two"), ("a/b",)])
def test_request_id_that_cannot_be_used_is_replaced(stub: InferenceStub, sent: tuple[str, ...]) -> None:
    metadata = tuple(("x-request-id", each) for each in sent)
    _, call = stub.ListModels.with_call(pb.ListModelsRequest(), metadata=metadata)
    given = dict(call.initial_metadata())["x-request-id"]
    assert given not in sent and len(given) == 32 and given.isalnum()


def test_method_nobody_wrote_is_unimplemented(stub: Any, refused: Any) -> None:
    method = stub.channel.unary_unary("/jaxserve.v1.Inference/Nothing")
    assert refused(lambda: method(b"")).status == grpc.StatusCode.UNIMPLEMENTED.name
