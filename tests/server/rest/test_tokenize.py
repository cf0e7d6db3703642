"""POST /tokenize and /detokenize say what the generation routes do."""

from typing import Any

import httpx
import pytest

TEXT = "The quick brown fox. Zwei Sätze äöü. 日本語 😀"
MESSAGES = [{"role": "system", "content": "a"}, {"role": "user", "content": "The fox"}]


def tokenize(live: Any, **body: Any) -> dict[str, Any]:
    answer = httpx.post(live.rest + "/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def error_of(live: Any, path: str, **body: Any) -> tuple[int, str, str | None]:
    answer = httpx.post(live.rest + path, json=body)
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def test_detokenize_undoes_tokenize(live: Any) -> None:
    found = tokenize(live, prompt=TEXT, model=live.model)
    assert found["count"] == len(found["tokens"]) > 5
    assert (found["max_model_len"], found["token_strs"]) == (256, None)
    answer = httpx.post(live.rest + "/detokenize", json={"tokens": found["tokens"]})
    assert answer.json() == {"prompt": TEXT}


def test_the_texts_of_ascii_tokens_make_the_prompt(live: Any) -> None:
    found = tokenize(live, prompt="The quick brown fox", return_token_strs=True)
    assert "".join(found["token_strs"]) == "The quick brown fox"
    assert len(found["token_strs"]) == found["count"]


def test_a_prompt_has_the_tokens_a_completion_has(live: Any) -> None:
    body = {"prompt": TEXT, "max_tokens": 1, "return_token_ids": True}
    choice = httpx.post(live.rest + "/v1/completions", json=body).json()["choices"][0]
    assert tokenize(live, prompt=TEXT)["tokens"] == choice["prompt_token_ids"]


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (MESSAGES, {}),
        (MESSAGES, {"add_generation_prompt": False}),
        ([*MESSAGES, {"role": "assistant", "content": "jumps"}], {"continue_final_message": True}),
        (MESSAGES, {"chat_template_kwargs": {"unused": 1}}),
    ],
)
def test_a_conversation_has_the_tokens_a_chat_has(live: Any, messages: Any, options: dict[str, Any]) -> None:
    body = {"messages": messages, "max_tokens": 1, "return_token_ids": True, **options}
    answer = httpx.post(live.rest + "/v1/chat/completions", json=body).json()
    assert tokenize(live, messages=messages, **options)["tokens"] == answer["prompt_token_ids"]


def test_text_that_spells_a_special_token_stays_text_in_a_message_only(live: Any) -> None:
    special = tokenize(live, prompt="<|end|>")["tokens"]
    assert len(special) == 1
    message = tokenize(live, messages=[{"role": "user", "content": "<|end|>"}], add_generation_prompt=False)["tokens"]
    assert message.count(special[0]) == 1, "the template's own, at the end of the message"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", "prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "invalid_value", "prompt"),
        ({"prompt": "a", "add_generation_prompt": True}, "invalid_value", "add_generation_prompt"),
        ({"prompt": "a", "continue_final_message": False}, "invalid_value", "continue_final_message"),
        ({"prompt": ["a"]}, "invalid_value", "prompt"),
        ({"messages": []}, "empty_prompt", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported_parameter", None),
        ({"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "unknown_parameter", "chat_template"),
        ({"prompt": "a", "promt": "b"}, "unknown_parameter", "promt"),
    ],
)
def test_what_cannot_be_tokenized_is_refused(live: Any, body: dict[str, Any], code: str, param: str | None) -> None:
    status, found, field = error_of(live, "/tokenize", **body)
    assert (status, found) == (400, code)
    assert field == param or (param is None and field is not None)


def test_a_prompt_beyond_the_context_is_refused_before_it_is_tokenized(live: Any) -> None:
    assert error_of(live, "/tokenize", prompt="a" * 2_000_000) == (400, "context_length_exceeded", "prompt")


def test_an_empty_prompt_has_no_tokens(live: Any) -> None:
    found = tokenize(live, prompt="", add_special_tokens=False, return_token_strs=True)
    assert (found["count"], found["tokens"], found["token_strs"]) == (0, [], [])
    assert httpx.post(live.rest + "/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("tokens", "code", "param"),
    [
        ([512], "token_out_of_range", "tokens"),
        ([2**63], "token_out_of_range", "tokens"),
        ([1, -1], "invalid_value", "tokens[1]"),
        ([1, "2"], "invalid_value", "tokens[1]"),
        ([1, 2.5], "invalid_value", "tokens[1]"),
        ([True], "invalid_value", "tokens[0]"),
        ("1", "invalid_value", "tokens"),
        (None, "invalid_value", "tokens"),
    ],
)
def test_what_is_no_token_is_refused(live: Any, tokens: Any, code: str, param: str) -> None:
    assert error_of(live, "/detokenize", tokens=tokens) == (400, code, param)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_another_model_gets_404(live: Any, path: str) -> None:
    body = {"prompt": "a"} if path == "/tokenize" else {"tokens": [1]}
    assert error_of(live, path, model="gpt-4", **body) == (404, "model_not_found", "model")
