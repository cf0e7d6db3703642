"""POST /v1/embeddings: checked like any request, and then refused, since the model only generates."""

from typing import Any

import httpx
import pytest


def error_of(live: Any, **body: Any) -> tuple[int, str, str | None]:
    answer = httpx.post(live.rest + "/v1/embeddings", json=body)
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


@pytest.mark.parametrize("value", ["text", ["a", "b"], [1, 2], [[1], [2, 3]]])
@pytest.mark.parametrize("options", [{}, {"encoding_format": "base64", "dimensions": 8, "user": "u"}])
def test_a_model_that_only_generates_says_so(live: Any, value: Any, options: dict[str, Any]) -> None:
    assert error_of(live, model=live.model, input=value, **options) == (400, "unsupported_model", "model")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "missing_required_parameter", "input"),
        ({"input": 5}, 400, "invalid_value", "input"),
        ({"input": ["a", 1]}, 400, "invalid_value", "input[1]"),
        ({"input": [-1]}, 400, "invalid_value", "input[0]"),
        ({"input": "a", "encoding_format": "hex"}, 400, "invalid_value", "encoding_format"),
        ({"input": "a", "dimensions": 0}, 400, "invalid_value", "dimensions"),
        ({"input": "a", "dimension": 8}, 400, "unknown_parameter", "dimension"),
        ({"input": "a", "model": "text-embedding-3-small"}, 404, "model_not_found", "model"),
    ],
)
def test_a_request_that_is_wrong_anyway_is_told_what_is_wrong(
    live: Any, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    assert error_of(live, **body) == (status, code, param)
