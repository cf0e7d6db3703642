"""/v1/completions against a whole front end with the tiny model, by plain HTTP and by OpenAI's client."""

import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PROMPT = "The quick brown"
URL = "/v1/completions"


def assembled(chunks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices a client puts together from a stream, by index."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for new in chunk["choices"]:
            choice = choices.setdefault(new["index"], {"text": "", "logprobs": None, "finish_reason": None})
            assert choice["finish_reason"] is None, "nothing comes after the last chunk of a choice"
            choice["text"] += new["text"]
            choice["finish_reason"] = new["finish_reason"]
            choice |= {key: new[key] for key in ("stop_reason", "prompt_token_ids") if key in new}
            if "token_ids" in new:
                choice["token_ids"] = choice.get("token_ids", []) + new["token_ids"]
            if new["logprobs"] is not None:
                old = choice["logprobs"] or {key: [] for key in new["logprobs"]}
                choice["logprobs"] = {key: old[key] + new["logprobs"][key] for key in old}
    return choices


# The answer


def test_answer_has_what_strict_clients_need(sdk: openai.OpenAI, live: Any) -> None:
    answer = sdk.completions.create(model=live.model, prompt=PROMPT, max_tokens=4, temperature=0)
    assert answer.id.startswith("cmpl-") and answer.model == live.model and answer.object == "text_completion"
    assert answer.usage is not None and answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    assert answer.choices[0].finish_reason == "length"
    assert answer.system_fingerprint is not None and answer.system_fingerprint.startswith("fp_")


def test_text_is_what_the_engine_generates(completions: Any, live: Any) -> None:
    params = live.llm.default_sampling_params(temperature=0, max_tokens=8)
    expected = live.llm.generate(PROMPT, params)[0].outputs[0].text
    assert completions.whole()["choices"][0]["text"] == expected


def test_max_tokens_is_16_by_default(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True}
    assert http.post(URL, json=body).json()["usage"]["completion_tokens"] == 16


def test_streamed_choices_equal_unary_choices(completions: Any) -> None:
    body: dict[str, Any] = {
        "n": 3,
        "temperature": 1.0,
        "seed": 7,
        "max_tokens": 20,
        "logprobs": 2,
        "return_token_ids": True,
    }
    unary = completions.whole(prompt=[PROMPT, "Zwei Sätze"], **body)["choices"]
    streamed = assembled(completions.events(prompt=[PROMPT, "Zwei Sätze"], **body))
    assert sorted(streamed) == list(range(6))
    for choice in unary:
        index = choice.pop("index")
        assert streamed[index] == choice


def test_streamed_echo_equals_unary_echo(completions: Any) -> None:
    for body in ({}, {"logprobs": 1}, {"prompt": [[5, 6, 7], [260, 261]], "logprobs": 0}, {"n": 2, "seed": 1}):
        unary = completions.whole(echo=True, **body)["choices"]
        streamed = assembled(completions.events(echo=True, **body))
        for choice in unary:
            index = choice.pop("index")
            assert streamed[index] == choice


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.one_of(st.text(min_size=1, max_size=30), st.lists(st.integers(2, 511), min_size=1, max_size=20)),
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop=st.lists(st.sampled_from(["e", "th", "\ufffd", " ", "ab"]), max_size=3),
    keep=st.booleans(),
    min_tokens=st.integers(0, 5),
)
def test_streamed_text_equals_unary_text(completions: Any, **body: Any) -> None:
    body["include_stop_str_in_output"] = body.pop("keep")
    if isinstance(body["prompt"], str) and any(0xD800 <= ord(char) < 0xE000 for char in body["prompt"]):
        return
    unary = completions.whole(max_tokens=12, **body)["choices"][0]
    streamed = assembled(completions.events(max_tokens=12, **body))[0]
    assert streamed["text"] == unary["text"]
    assert streamed["finish_reason"] == unary["finish_reason"]
    assert streamed["stop_reason"] == unary["stop_reason"]


def test_prompts_of_a_list_are_answered_as_alone(completions: Any) -> None:
    prompts = [PROMPT, "Zwei", "日本語"]
    together = completions.whole(prompt=prompts)
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    alone = [completions.whole(prompt=prompt) for prompt in prompts]
    assert [c["text"] for c in together["choices"]] == [a["choices"][0]["text"] for a in alone]
    assert together["usage"]["prompt_tokens"] == sum(answer["usage"]["prompt_tokens"] for answer in alone)


def test_token_ids_and_lists_of_them_are_prompts(http: httpx.Client, completions: Any) -> None:
    ids = http.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    expected = completions.whole()["choices"][0]["text"]
    assert completions.whole(prompt=ids)["choices"][0]["text"] == expected
    assert [choice["text"] for choice in completions.whole(prompt=[ids, ids])["choices"]] == [expected] * 2


def test_usage_chunk_is_last_and_equals_the_unary_usage(completions: Any) -> None:
    usage = completions.whole(n=2)["usage"]
    chunks = completions.events(n=2, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    streamed = chunks[-1]["usage"]
    assert {key: streamed[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        key: usage[key] for key in ("prompt_tokens", "completion_tokens", "total_tokens")
    }
    assert all("usage" not in chunk for chunk in completions.events())


def test_continuous_usage_counts_what_was_sent(completions: Any) -> None:
    chunks = completions.events(stream_options={"continuous_usage_stats": True}, return_token_ids=True)
    sent = 0
    for chunk in chunks:
        sent += sum(len(choice["token_ids"]) for choice in chunk["choices"])
        assert chunk["usage"]["completion_tokens"] >= sent
    assert chunks[-1]["usage"]["completion_tokens"] == sent == 8


def test_logprobs_have_openais_completion_format(completions: Any) -> None:
    choice = completions.whole(logprobs=3, max_tokens=10)["choices"][0]
    logprobs = choice["logprobs"]
    assert {len(entry) for entry in logprobs.values()} == {10}
    for token, chosen, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == chosen == max(top.values()), "greedy picks the likeliest"
        assert len(top) <= 4
    offsets = logprobs["text_offset"]
    assert offsets[0] == 0 and offsets == sorted(offsets)
    for token, start in zip(logprobs["tokens"], offsets, strict=True):
        if "\ufffd" not in token:
            assert choice["text"][start : start + len(token)] == token


def test_echoed_prompt_has_logprobs_but_for_its_first_token(completions: Any) -> None:
    choice = completions.whole(echo=True, logprobs=1, max_tokens=2)["choices"][0]
    assert choice["text"].startswith(PROMPT)
    logprobs = choice["logprobs"]
    num_prompt = len(logprobs["tokens"]) - 2
    assert "".join(logprobs["tokens"][:num_prompt]) == PROMPT
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert [PROMPT[start] for start in logprobs["text_offset"][:num_prompt]] == [
        t[0] for t in logprobs["tokens"][:num_prompt]
    ]
    assert logprobs["text_offset"][num_prompt] == len(PROMPT)


def test_prompt_logprobs_have_vllms_format(completions: Any) -> None:
    choice = completions.whole(prompt_logprobs=2, return_token_ids=True)["choices"][0]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    for token, position in zip(choice["prompt_token_ids"][1:], rest, strict=True):
        entry = position[str(token)]
        assert set(entry) == {"logprob", "rank", "decoded_token"} and 2 <= len(position) <= 3
        assert sorted(other["rank"] for other in position.values())[:2] == [1, 2]


def test_impossible_tokens_have_a_finite_logprob(completions: Any) -> None:
    answer = completions.whole(logprobs=5, allowed_token_ids=[40, 41])
    assert all(value >= -9999.0 for value in answer["choices"][0]["logprobs"]["token_logprobs"])


def test_tokens_can_be_named_by_id(completions: Any) -> None:
    choice = completions.whole(logprobs=1, return_tokens_as_token_ids=True, return_token_ids=True)["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(key.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"] for key in top)


def test_stop_string_ends_the_choice_and_is_named(completions: Any) -> None:
    text = completions.whole(max_tokens=24)["choices"][0]["text"]
    stop = text[6:9]
    choice = completions.whole(max_tokens=24, stop=[stop])["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    kept = completions.whole(max_tokens=24, stop=stop, include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == choice["text"] + stop


def test_stop_token_id_ends_the_choice_and_is_named(completions: Any) -> None:
    ids = completions.whole(return_token_ids=True)["choices"][0]["token_ids"]
    choice = completions.whole(stop_token_ids=[ids[3]])["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids[3])


def test_logit_bias_and_allowed_tokens_decide_what_is_generated(completions: Any) -> None:
    biased = completions.whole(logit_bias={"77": 100}, return_token_ids=True)["choices"][0]["token_ids"]
    assert biased == [77] * 8
    allowed = completions.whole(allowed_token_ids=[80, 81], temperature=1, return_token_ids=True)["choices"][0][
        "token_ids"
    ]
    assert set(allowed) <= {80, 81}


def test_truncation_keeps_the_asked_side_and_is_echoed(completions: Any) -> None:
    ids = list(range(60, 80))
    left = completions.whole(prompt=ids, truncate_prompt_tokens=5, return_token_ids=True)["choices"][0]
    right = completions.whole(prompt=ids, truncate_prompt_tokens=5, truncation_side="right", return_token_ids=True)
    assert left["prompt_token_ids"] == ids[-5:]
    assert right["choices"][0]["prompt_token_ids"] == ids[:5]
    most = completions.whole(prompt=[70] * 400, truncate_prompt_tokens=-1, max_tokens=1)
    assert most["usage"]["prompt_tokens"] == 255


def test_timings_come_with_the_answer_and_in_the_last_chunk(completions: Any) -> None:
    assert "timings" not in completions.whole()
    for timings in (
        completions.whole(return_timings=True)["timings"],
        completions.events(return_timings=True)[-1]["timings"],
    ):
        assert 0 <= timings["queue_seconds"] <= timings["time_to_first_token_seconds"] <= timings["total_seconds"]
        assert timings["preemptions"] == 0


def test_cached_prefix_is_counted(completions: Any) -> None:
    prompt = list(range(100, 140))
    body = {"prompt": prompt, "cache_salt": "cached-prefix"}
    assert completions.whole(**body)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert completions.whole(**body)["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32
    other = completions.whole(prompt=prompt, cache_salt="other")
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    chunks = completions.events(stream_options={"include_usage": True}, **body)
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32


def test_request_id_of_the_body_counts_like_the_header(http: httpx.Client) -> None:
    response = http.post(URL, json={"prompt": PROMPT, "max_tokens": 1, "request_id": "mine-7"})
    assert response.headers["x-request-id"] == "mine-7"
    for stream in (True, False):
        refused = http.post(URL, json={"prompt": [512], "stream": stream, "request_id": "mine-8"})
        assert refused.status_code == 400 and refused.headers["x-request-id"] == "mine-8"
    replaced = http.post(URL, json={"prompt": PROMPT, "max_tokens": 1, "request_id": "bad\nid"})
    assert replaced.headers["x-request-id"].isalnum()


def test_sdk_streams_the_text_of_the_unary_answer(live: Any, sdk: openai.OpenAI, make_sdk: Any) -> None:
    ask = {"model": live.model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    expected = sdk.completions.create(**ask).choices[0].text
    # Strict validation forbids the null finish_reason that every chunk but the last must have.
    chunks = make_sdk(False).completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


# Ends


def test_aborted_choice_ends_with_stop_and_says_so(http: httpx.Client, live: Any) -> None:
    body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with http.stream("POST", URL, json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        first = json.loads(next(lines).removeprefix("data: "))
        live.loop.call_soon_threadsafe(live.frontend.abort, first["id"])
        last = json.loads([*lines][-1].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["stop_reason"] == "aborted"


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_ends_the_generation(live: Any, stream: bool) -> None:
    body = {"prompt": [PROMPT] * 4, "max_tokens": 240, "ignore_eos": True, "stream": stream}
    with httpx.Client(base_url=live.rest) as client:
        if stream:
            with client.stream("POST", URL, json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(URL, json=body, timeout=0.05)
    live.assert_idle()


def test_passed_deadline_is_a_504_in_a_stream_too(http: httpx.Client) -> None:
    for stream in (False, True):
        body = {"prompt": [[9] * 200] * 64, "max_tokens": 40, "ignore_eos": True, "stream": stream}
        response = http.post(URL, json=body, headers={"X-Request-Timeout": "0.000001"})
        assert response.status_code == 504 and response.json()["error"]["code"] == "deadline_exceeded"


def test_error_after_the_first_token_is_an_event_the_sdk_raises(live: Any, make_sdk: Any) -> None:
    ask = {"model": live.model, "prompt": PROMPT, "max_tokens": 240, "extra_body": {"ignore_eos": True}}
    stream = make_sdk(False).completions.create(**ask, stream=True)
    next(iter(stream))
    live.loop.call_soon_threadsafe(lambda: [call.end("draining") for call in live.frontend.open_calls])
    with pytest.raises(openai.APIError) as raised:
        for _ in stream:
            pass
    assert raised.value.code == "draining"


def test_full_queue_is_a_429_in_a_stream_too(start_live: Any) -> None:
    front = start_live(max_num_queued_reqs=0)
    capacity, slots = front.frontend.capacity, front.frontend.engine.info.limits.max_num_seqs
    front.loop.call_soon_threadsafe(capacity.reserve, slots)
    for stream in (False, True):
        body = {"prompt": "a", "max_tokens": 4, "stream": stream}
        response = httpx.post(front.rest + URL, json=body)
        assert response.status_code == 429 and response.json()["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
    front.loop.call_soon_threadsafe(capacity.release, slots, 0, False)
    front.until(lambda: not capacity.samples)
    front.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
def test_what_could_never_fit_is_no_reason_to_try_again(start_live: Any, stream: bool) -> None:
    front = start_live(max_num_queued_reqs=0)
    response = httpx.post(front.rest + URL, json={"prompt": ["a"] * 30, "max_tokens": 4, "stream": stream})
    assert response.status_code == 400 and response.json()["error"]["param"] == "n"
    assert "retry-after" not in response.headers
