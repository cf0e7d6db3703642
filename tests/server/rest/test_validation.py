"""Which of the errors of a body is told, and how."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError, field_validator

from jaxserve.errors import InvalidRequestError
from server.errors import ServiceError
from server.rest.body import parse_json
from server.rest.types_chat import ChatRequest
from server.rest.types_completion import CompletionRequest
from server.rest.types_misc import RequestBody
from server.rest.types_tokenize import TokenizeRequest
from server.rest.validation import shown, validated


class Part(RequestBody):
    type: str
    text: str


class Message(RequestBody):
    content: str | list[Part] | None = None
    name: str | None = None


class Everything(RequestBody):
    prompt: str | list[int] | list[str] | list[list[int]] = ""
    messages: list[Message] = []
    bias: dict[str, float] = {}
    size: int = 0

    @field_validator("size")
    @classmethod
    def _positive(cls, size: int) -> int:
        if size < 0:
            raise InvalidRequestError(f"size={size} must not be negative", "size", size)
        if size > 9:
            raise ValueError("Must be one digit")
        return size


NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, 2**64, -(2**63), 1e308])
NAMES = st.text(max_size=5) | st.sampled_from([*ChatRequest.model_fields, *CompletionRequest.model_fields])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(NAMES, values, max_size=4),
)


def error_of(data: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        validated(data, Everything)
    return caught.value


@pytest.mark.parametrize(
    ("data", "code", "param"),
    [
        ({"prompt": 5}, "invalid_value", "prompt"),
        ({"prompt": ["a", 5]}, "invalid_value", "prompt[1]"),
        ({"prompt": [1, 2, "a"]}, "invalid_value", "prompt[2]"),
        ({"prompt": [[1], [2, "a"]]}, "invalid_value", "prompt[1][1]"),
        (
            {"messages": [{"content": [{"type": "text", "txt": "a"}]}]},
            "unknown_parameter",
            "messages[0].content[0].txt",
        ),
        (
            {"messages": [{}, {"content": [{"type": "text"}]}]},
            "missing_required_parameter",
            "messages[1].content[0].text",
        ),
        ({"messages": {}}, "invalid_value", "messages"),
        ({"bias": {"a": "b"}}, "invalid_value", "bias.a"),
        ({"siez": 1, "size": -1}, "unknown_parameter", "siez"),
        ({"size": -1}, "invalid_value", "size"),
        ({"size": 10}, "invalid_value", "size"),
    ],
)
def test_the_error_is_told_where_the_value_went_wrong(data: Any, code: str, param: str) -> None:
    error = error_of(data)
    assert (error.code, error.param) == (code, param)


def test_alternatives_that_fail_at_the_same_place_are_told_together() -> None:
    message = str(error_of({"messages": [{"content": 5}]}))
    assert message == "messages[0].content=5 must be a valid string or a valid list"


def test_the_message_of_a_validator_is_kept() -> None:
    assert str(error_of({"size": -1})) == "size=-1 must not be negative"
    assert str(error_of({"size": 10})) == "size=10 Must be one digit"


def test_an_unknown_field_inside_a_union_is_compared_with_the_fields_of_that_place() -> None:
    assert "did you mean text?" in str(error_of({"messages": [{"content": [{"type": "text", "txet": "a"}]}]}))


def test_collections_stop_at_their_first_wrong_item() -> None:
    wrong: list[dict[str, Any]] = [
        {"prompt": [1] * 1000 + ["a"] * 1000},
        {"messages": [{"name": 1}] * 1000},
        {"bias": {str(i): "a" for i in range(1000)}},
    ]
    for data in wrong:
        with pytest.raises(ValidationError) as caught:
            Everything.model_validate(data)
        assert caught.value.error_count() < 10


def test_without_strictness_unknown_fields_are_left_out_at_any_depth() -> None:
    data = {"size": 1, "a": 1, "messages": [{"name": "b", "c": 1}, {"content": [{"type": "t", "text": "d", "e": 1}]}]}
    kept = validated(data, Everything, warn=True)
    assert kept.model_dump(exclude_unset=True) == {
        "size": 1,
        "messages": [{"name": "b"}, {"content": [{"type": "t", "text": "d"}]}],
    }
    assert "a" in data, "what the caller holds is not changed"


@pytest.mark.parametrize(
    "value", ["x" * 10**6, ["x" * 10**6] * 10**4, {"x" * 10**6: "y" * 10**6}, "\n\ud800é", [[[[[[1]]]]]]]
)
def test_a_value_is_shown_in_a_few_printable_characters(value: Any) -> None:
    text = shown(value)
    assert len(text) <= 100 and text.isascii() and text.isprintable()


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_json_or_an_error_with_a_code(body: bytes) -> None:
    with contextlib.suppress(ServiceError):
        json.dumps(parse_json(body), allow_nan=False)


@given(VALUES | st.dictionaries(NAMES, VALUES), st.booleans())
def test_any_json_is_a_request_or_an_error_that_can_be_sent(data: Any, warn: bool) -> None:
    for type_ in (CompletionRequest, ChatRequest, TokenizeRequest):
        try:
            assert isinstance(validated(data, type_, warn), type_)
        except ServiceError as error:
            assert len(json.dumps(error.body())) < 2000
