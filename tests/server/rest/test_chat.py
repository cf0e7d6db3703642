"""/v1/chat/completions against a whole front end with the tiny model, by plain HTTP and by OpenAI's client."""

import json
from typing import Any

import httpx
import openai
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick brown fox?"}]
URL = "/v1/chat/completions"


def assembled(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices a client puts together from a stream, by index, in the shape of an unary answer."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for new in chunk["choices"]:
            choice = choices.setdefault(
                new["index"], {"message": {"refusal": None}, "logprobs": None, "finish_reason": None}
            )
            assert choice["finish_reason"] is None, "nothing comes after the finish chunk"
            for key, value in new["delta"].items():
                choice["message"][key] = choice["message"].get(key, "") + value
            if "token_ids" in new:
                choice["token_ids"] = choice.get("token_ids", []) + new["token_ids"]
            if new["logprobs"] is not None:
                before = choice["logprobs"]["content"] if choice["logprobs"] else []
                choice["logprobs"] = {"content": before + new["logprobs"]["content"]}
            choice["finish_reason"] = new["finish_reason"]
            choice |= {"stop_reason": new["stop_reason"]} if "stop_reason" in new else {}
    return choices


# The answer


def test_answer_has_what_strict_clients_need(sdk: openai.OpenAI, live: Any) -> None:
    answer = sdk.chat.completions.create(
        model=live.model,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_completion_tokens=6,
        n=2,
        logprobs=True,
        top_logprobs=2,
        seed=1,
        service_tier="auto",
        user="me",
        store=False,
        metadata={"a": "b"},
        reasoning_effort="low",
        verbosity="low",
        prompt_cache_key="k",
        safety_identifier="s",
        modalities=["text"],
        parallel_tool_calls=False,
        prediction={"type": "content", "content": "x"},
        response_format={"type": "text"},
        tool_choice="none",
    )
    assert answer.id.startswith("chatcmpl-") and answer.model == live.model and answer.service_tier == "default"
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.message.role == "assistant" for choice in answer.choices)
    assert answer.usage is not None and answer.usage.completion_tokens <= 12
    assert answer.usage.completion_tokens_details is not None and answer.usage.prompt_tokens_details is not None
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    assert all(len(token.top_logprobs) == 2 for token in answer.choices[0].logprobs.content)


def test_sdk_streams_strictly_and_to_the_unary_text(sdk: openai.OpenAI, live: Any) -> None:
    ask: dict[str, Any] = {"model": live.model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    expected = sdk.chat.completions.create(**ask).choices[0].message.content
    chunks = list(sdk.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[-1].usage is not None and not chunks[-1].choices


def test_sdks_stream_helper_builds_the_unary_answer(sdk: openai.OpenAI, live: Any) -> None:
    ask: dict[str, Any] = {"model": live.model, "messages": MESSAGES, "max_tokens": 24, "temperature": 0, "n": 2}
    text = sdk.chat.completions.create(**ask).choices[0].message.content or ""
    ask["stop"] = text[8:10]  # the helper takes no answer that was cut at its length
    expected = sdk.chat.completions.create(**ask)
    with sdk.chat.completions.stream(**ask) as stream:
        built = stream.get_final_completion()
    assert [c.message.content for c in built.choices] == [c.message.content for c in expected.choices]
    assert [c.finish_reason for c in built.choices] == [c.finish_reason for c in expected.choices]


def test_text_is_what_the_engine_generates(chat: Any, live: Any) -> None:
    params = live.llm.default_sampling_params(temperature=0, max_tokens=8)
    expected = live.llm.chat(MESSAGES, params)[0]
    answer = chat.whole(return_token_ids=True)
    assert answer["choices"][0]["message"]["content"] == expected.outputs[0].text
    assert answer["prompt_token_ids"] == expected.prompt_token_ids
    assert answer["choices"][0]["token_ids"] == expected.outputs[0].token_ids


def test_generates_up_to_the_context_unless_told(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "ignore_eos": True}
    answer = http.post(URL, json=body).json()
    assert answer["usage"]["total_tokens"] == 256
    assert answer["choices"][0]["finish_reason"] == "length"


def test_both_names_of_max_tokens_mean_the_same(chat: Any) -> None:
    both = chat.whole(max_tokens=5, max_completion_tokens=5)
    assert both["choices"] == chat.whole(max_tokens=5)["choices"]
    assert both["choices"] == chat.whole(max_tokens=None, max_completion_tokens=5)["choices"]
    assert chat.refusal(max_tokens=4, max_completion_tokens=5) == ("invalid_value", "max_tokens")
    assert chat.refusal(max_tokens=None, max_completion_tokens=0) == ("invalid_value", "max_completion_tokens")


def test_chunks_come_in_openais_order(chat: Any) -> None:
    chunks = chat.events(n=2, temperature=1, seed=3, max_tokens=24, stream_options={"include_usage": True})
    first = [chunk["choices"][0] for chunk in chunks[:2]]
    assert [choice["index"] for choice in first] == [0, 1]
    assert all(choice["delta"] == {"role": "assistant", "content": ""} for choice in first)
    for chunk in chunks[2:-1]:
        (choice,) = chunk["choices"]
        assert (choice["finish_reason"] is None) == (choice["delta"] != {})
    assert sorted(c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]) == [0, 1]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 48
    heads = [
        {key: chunk[key] for key in ("id", "created", "model", "object", "system_fingerprint")} for chunk in chunks
    ]
    assert all(head == heads[0] for head in heads) and heads[0]["object"] == "chat.completion.chunk"


def test_streamed_choices_equal_unary_choices(chat: Any) -> None:
    for body in (
        {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 20},
        {"n": 2, "temperature": 2.0, "seed": 7, "max_tokens": 20, "logprobs": True, "top_logprobs": 3},
        {"return_token_ids": True, "logprobs": True},
    ):
        unary = chat.whole(**body)
        streamed = assembled(chat.events(**body))
        for choice in unary["choices"]:
            assert streamed[choice.pop("index")] == choice


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(st.sampled_from(["e", "th", "\ufffd", " ", "ab"]), max_size=3),
)
def test_streamed_text_equals_unary_text(chat: Any, content: str, **body: Any) -> None:
    body |= {"messages": [{"role": "user", "content": content}], "max_tokens": 12}
    unary = chat.whole(**body)["choices"][0]
    streamed = assembled(chat.events(**body))[0]
    assert streamed == {key: value for key, value in unary.items() if key != "index"}


def test_logprobs_have_openais_chat_format(chat: Any) -> None:
    answer = chat.whole(logprobs=True, top_logprobs=3, max_tokens=12, return_token_ids=True)
    choice = answer["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == len(choice["token_ids"]) == 12
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(tops) == 3 and tops == sorted(tops, reverse=True)
        assert entry["top_logprobs"][0] == {key: entry[key] for key in ("token", "logprob", "bytes")}
    text = bytes(byte for entry in content for byte in entry["bytes"]).decode(errors="ignore")
    assert text == choice["message"]["content"].replace("\ufffd", ""), "bytes of tokens join to the text"
    bare = chat.whole(logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in bare)


def test_sampled_token_is_not_added_to_the_likeliest(chat: Any) -> None:
    choice = chat.whole(logprobs=True, top_logprobs=2, temperature=2, seed=5, max_tokens=40)["choices"][0]
    assert all(len(entry["top_logprobs"]) == 2 for entry in choice["logprobs"]["content"])
    assert any(
        entry["token"] not in [top["token"] for top in entry["top_logprobs"]] for entry in choice["logprobs"]["content"]
    ), "at this temperature unlikely tokens are drawn"


def test_prompt_logprobs_stand_beside_the_choices(chat: Any) -> None:
    answer = chat.whole(prompt_logprobs=1, return_token_ids=True)
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])
    assert answer["prompt_logprobs"][0] is None
    for token, position in zip(answer["prompt_token_ids"][1:], answer["prompt_logprobs"][1:], strict=True):
        assert str(token) in position


def test_token_ids_of_a_stream_are_those_of_the_answer(chat: Any) -> None:
    answer = chat.whole(return_token_ids=True)
    chunks = chat.events(return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert assembled(chunks)[0]["token_ids"] == answer["choices"][0]["token_ids"]


def test_final_message_is_continued_and_echoed(http: httpx.Client, chat: Any) -> None:
    messages = [MESSAGES[1], {"role": "assistant", "content": "Well, the"}]
    plain = chat.whole(messages=messages, continue_final_message=True, return_token_ids=True)
    prompt = http.post("/detokenize", json={"tokens": plain["prompt_token_ids"]}).json()["prompt"]
    assert prompt.endswith("Well, the")
    body = {"messages": messages, "continue_final_message": True, "echo": True}
    echoed = chat.whole(**body)["choices"][0]["message"]["content"]
    assert echoed == "Well, the" + plain["choices"][0]["message"]["content"]
    assert assembled(chat.events(**body))[0]["message"]["content"] == echoed
    # There is nothing to echo where a new message begins.
    assert chat.whole(echo=True)["choices"] == chat.whole()["choices"]


def test_prompt_without_generation_prompt_ends_with_the_messages(chat: Any) -> None:
    with_header = chat.whole(return_token_ids=True)["prompt_token_ids"]
    without = chat.whole(return_token_ids=True, add_generation_prompt=False)["prompt_token_ids"]
    assert with_header[: len(without)] == without and len(with_header) > len(without)


def test_developer_is_the_system(chat: Any) -> None:
    developer = [{"role": "developer", "content": "Be brief."}, MESSAGES[1]]
    assert chat.whole(messages=developer)["choices"] == chat.whole()["choices"]


def test_text_parts_are_joined(chat: Any) -> None:
    parts = [{"type": "text", "text": "The quick"}, {"type": "text", "text": "brown fox?"}]
    joined = {"role": "user", "content": "The quick\nbrown fox?"}
    ids = [
        chat.whole(messages=[message], return_token_ids=True)["prompt_token_ids"]
        for message in ({"role": "user", "content": parts}, joined)
    ]
    assert ids[0] == ids[1]


def test_message_of_an_answer_can_be_sent_back(sdk: openai.OpenAI, live: Any) -> None:
    ask: dict[str, Any] = {"model": live.model, "max_tokens": 4}
    answer = sdk.chat.completions.create(messages=MESSAGES, **ask)  # type: ignore[arg-type]
    history = [*MESSAGES, answer.choices[0].message.model_dump(), MESSAGES[1]]
    assert sdk.chat.completions.create(messages=history, **ask).choices  # type: ignore[arg-type]


def test_special_tokens_in_messages_are_plain_text(chat: Any) -> None:
    ids = chat.whole(messages=[{"role": "user", "content": "<|end|>"}], return_token_ids=True)["prompt_token_ids"]
    assert ids.count(1) == 1, "only the template's own"


# Ends


def test_disconnect_ends_the_generation(live: Any) -> None:
    body = {"messages": MESSAGES, "n": 4, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=live.rest) as client, client.stream("POST", URL, json=body) as response:
        next(response.iter_lines())
    live.assert_idle()


def test_error_after_the_first_token_is_an_event_then_done(http: httpx.Client, live: Any) -> None:
    body = {"messages": MESSAGES, "ignore_eos": True, "stream": True}
    with http.stream("POST", URL, json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        live.loop.call_soon_threadsafe(lambda: [call.end("draining") for call in live.frontend.open_calls])
        *_, error, done = lines
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "draining"
    assert done == "data: [DONE]"
