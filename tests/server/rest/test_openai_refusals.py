"""What the generation routes refuse: the code, and the parameter as the client spelled it, streamed or not."""

from typing import Any

import httpx
import pytest

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick brown fox?"}]
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"suffix": "end"}, "unsupported_parameter", "suffix"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"n": 2, "best_of": 3}, "unsupported_parameter", "best_of"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"prompt_embeds": "AAAA"}, "unsupported_parameter", "prompt_embeds"),
        ({"use_beam_search": True}, "unsupported_parameter", "use_beam_search"),
        ({"guided_json": {"type": "object"}}, "unsupported_parameter", "guided_json"),
        ({"stream": True, "prompt_logprobs": 1}, "unsupported_parameter", "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "unsupported_parameter",
            "stream_options.include_obfuscation",
        ),
        ({"stream_options": {"nope": 1}, "stream": True}, "unknown_parameter", "stream_options.nope"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": -1}, "invalid_value", "max_tokens"),
        ({"min_tokens": 9}, "invalid_value", "min_tokens"),
        ({"n": 10**9}, "invalid_value", "n"),
        ({"n": 0}, "invalid_value", "n"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": "1"}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"logprobs": 1000}, "invalid_value", "logprobs"),
        ({"logprobs": -1}, "invalid_value", "logprobs"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"logit_bias": {"600": 1}}, "token_out_of_range", "logit_bias"),
        ({"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "invalid_value", "logit_bias"),
        ({"stop": ["a"] * 17}, "invalid_value", "stop"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop_token_ids": [512]}, "token_out_of_range", "stop_token_ids"),
        ({"allowed_token_ids": []}, "invalid_value", "allowed_token_ids"),
        ({"bad_words": [""]}, "invalid_value", "bad_words"),
        ({"truncate_prompt_tokens": 0}, "invalid_value", "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "invalid_value", "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "invalid_value", "truncation_side"),
        ({"cache_salt": "s" * 129}, "invalid_value", "cache_salt"),
        ({"priority": 2**31}, "invalid_value", "priority"),
        ({"prompt": ""}, "empty_prompt", "prompt"),
        ({"prompt": []}, "empty_prompt", "prompt"),
        ({"prompt": [[]]}, "empty_prompt", "prompt"),
        ({"prompt": [512]}, "token_out_of_range", "prompt"),
        ({"prompt": [-1]}, "token_out_of_range", "prompt"),
        ({"prompt": None}, "invalid_value", "prompt"),
        ({"prompt": {"a": 1}}, "invalid_value", "prompt"),
        ({"prompt": [1.5]}, "invalid_value", "prompt[0]"),
        ({"prompt": ["x"] * 1025}, "invalid_value", "prompt"),
        ({"prompt": ["x"] * 100, "n": 100}, "invalid_value", "n"),
        ({"prompt": [5] * 256}, "context_length_exceeded", "prompt"),
        ({"prompt": "word " * 1000}, "context_length_exceeded", "prompt"),
    ],
)
def test_refused_completion_names_parameter_and_code(
    completions: Any, body: dict[str, Any], code: str, param: str
) -> None:
    assert completions.refusal(**body) == (code, param)
    if param != "stream_options":
        assert completions.refusal(**{"stream": True, **body}) == (code, param)


def test_missing_prompt_is_named(http: httpx.Client) -> None:
    error = http.post("/v1/completions", json={"max_tokens": 1}).json()["error"]
    assert (error["code"], error["param"]) == ("missing_required_parameter", "prompt")


def test_unknown_model_is_a_404_before_the_stream(completions: Any, chat: Any) -> None:
    for route in (completions, chat):
        for stream in (False, True):
            response = route.post(model="nope", stream=stream)
            assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"


def test_one_bad_prompt_refuses_the_whole_list(completions: Any) -> None:
    assert completions.refusal(prompt=[[5], [9999]]) == ("token_out_of_range", "prompt")


def test_nulls_and_empty_values_ask_for_nothing(http: httpx.Client, completions: Any) -> None:
    fields = http.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]["properties"]
    nulls = {name: None for name in fields if name not in ("prompt", "max_tokens", "temperature")}
    assert completions.whole(**nulls)["choices"] == completions.whole()["choices"]
    assert completions.whole(use_beam_search=False, best_of=1, user="me")["choices"] == completions.whole()["choices"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "tools"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"tool_choice": "auto"}, "unsupported_parameter", "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "unsupported_parameter", "tool_choice"),
        ({"function_call": "auto"}, "unsupported_parameter", "function_call"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}},
            "unsupported_parameter",
            "response_format",
        ),
        ({"response_format": {"type": "grammar"}}, "invalid_value", "response_format.type"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "unsupported_parameter", "audio"),
        ({"web_search_options": {"search_context_size": "low"}}, "unsupported_parameter", "web_search_options"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"service_tier": "priority"}, "invalid_value", "service_tier"),
        ({"chat_template": "{{ 1 }}"}, "unsupported_parameter", "chat_template"),
        (
            {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "unsupported_parameter",
            "chat_template_kwargs.chat_template",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "invalid_value", "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"tools": []}}, "invalid_value", "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"self": 1}}, "invalid_value", "chat_template_kwargs.self"),
        ({"chat_template_kwargs": {"template": 1}}, "invalid_value", "chat_template_kwargs.template"),
        ({"chat_template_kwargs": {"tokenizer": 1}}, "invalid_value", "chat_template_kwargs.tokenizer"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "invalid_value", "chat_template_kwargs.bos_token"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "unsupported_parameter", "messages[0].content[0]"),
        (
            {"messages": [MESSAGES[0], {"role": "user", "content": [{"type": "input_audio"}]}]},
            "unsupported_parameter",
            "messages[1].content[0]",
        ),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "missing_required_parameter", "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "unknown_parameter", "messages[0].colour"),
        (
            {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "a"}}]},
            "unsupported_parameter",
            "messages[0].audio",
        ),
        (
            {"messages": [{"role": "assistant", "content": [5]}], "continue_final_message": True, "echo": True},
            "invalid_value",
            "messages[0].content",
        ),
        ({"messages": []}, "empty_prompt", "messages"),
        ({"messages": "hello"}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": "word " * 1000}]}, "context_length_exceeded", "messages"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 1000}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "invalid_value", "top_logprobs"),
        ({"logprobs": 1}, "invalid_value", "logprobs"),
        ({"n": 129}, "invalid_value", "n"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "invalid_value", "continue_final_message"),
        ({"stream_options": {}}, "invalid_value", "stream_options"),
        ({"stream": "true"}, "invalid_value", "stream"),
        ({"best_of": 2}, "unknown_parameter", "best_of"),
        ({"max_tokenz": 2}, "unknown_parameter", "max_tokenz"),
    ],
)
def test_refused_chat_names_parameter_and_code(chat: Any, body: dict[str, Any], code: str, param: str) -> None:
    assert chat.refusal(**body) == (code, param)
    if param not in ("stream", "stream_options"):
        assert chat.refusal(**body, stream=True) == (code, param)


def test_nulls_in_a_chat_ask_for_nothing(http: httpx.Client, chat: Any) -> None:
    fields = http.get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]["properties"]
    nulls = {name: None for name in fields if name not in ("messages", "max_tokens", "temperature")}
    assert chat.whole(**nulls)["choices"] == chat.whole()["choices"]


def test_every_field_is_described(http: httpx.Client) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest"):
        assert len(schemas[name]["properties"]) > 40
        assert not [field for field, schema in schemas[name]["properties"].items() if not schema.get("description")]
