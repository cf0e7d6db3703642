"""/openapi.json: complete, closed in itself, and true of what the routes answer."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from server.rest.types_misc import REQUEST_MODELS


def document(url: str) -> dict[str, Any]:
    answer = httpx.get(url + "/openapi.json")
    assert answer.status_code == 200
    return answer.json()


@pytest.fixture(scope="module")
def documents(start_live: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    live = start_live()
    return {"rest": document(live.rest), "admin": document(live.admin)}


def operations(found: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


def test_every_route_is_described(documents: dict[str, dict[str, Any]]) -> None:
    found = {(method, path) for path, method, _ in operations(documents["rest"])}
    assert found == {
        ("post", "/v1/completions"),
        ("post", "/v1/chat/completions"),
        ("post", "/v1/embeddings"),
        ("post", "/tokenize"),
        ("post", "/detokenize"),
        ("get", "/v1/models"),
        ("get", "/v1/models/{id}"),
        ("get", "/v1/engine/status"),
        ("get", "/version"),
        ("get", "/ping"),
        ("get", "/health"),
        ("get", "/health/live"),
        ("get", "/health/ready"),
    }
    assert {path for path, _, _ in operations(documents["admin"])} >= {
        "/metrics",
        "/admin/reset_prefix_cache",
        "/admin/abort",
        "/admin/drain",
        "/admin/status",
    }


@pytest.mark.parametrize("port", ["rest", "admin"])
def test_every_reference_leads_somewhere_and_every_schema_is_used(
    documents: dict[str, dict[str, Any]], port: str
) -> None:
    found = documents[port]
    used = {reference.removeprefix("#/components/schemas/") for reference in references(found)}
    assert used == set(found["components"]["schemas"])


@pytest.mark.parametrize("port", ["rest", "admin"])
def test_every_error_has_the_error_schema(documents: dict[str, dict[str, Any]], port: str) -> None:
    for path, _method, operation in operations(documents[port]):
        for status, response in operation["responses"].items():
            if status == "200" or path.startswith(("/health", "/ping")):
                continue
            schema = response["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorResponse"}, (path, status)


def test_every_post_route_describes_its_body_and_how_it_is_refused(documents: dict[str, dict[str, Any]]) -> None:
    for path, method, operation in operations(documents["rest"]):
        assert ("requestBody" in operation) == (method == "post"), path
        if method == "post":
            assert operation["requestBody"]["required"] is True
            assert {"400", "401", "404", "408", "413", "415"} <= set(operation["responses"]), path


@pytest.mark.parametrize("name", ["CompletionRequest", "ChatRequest", "TokenizeRequest", "EmbeddingRequest"])
def test_a_request_schema_has_every_field_and_no_other(documents: dict[str, dict[str, Any]], name: str) -> None:
    schema = documents["rest"]["components"]["schemas"][name]
    assert set(schema["properties"]) == set(REQUEST_MODELS[name].model_fields)
    assert schema["additionalProperties"] is False


def test_no_two_operations_have_one_id(documents: dict[str, dict[str, Any]]) -> None:
    ids = [operation["operationId"] for found in documents.values() for _, _, operation in operations(found)]
    rest = [operation["operationId"] for _, _, operation in operations(documents["rest"])]
    assert len(set(rest)) == len(rest) and len(ids) > len(rest)


def test_with_keys_the_document_needs_one_and_says_which_routes_do(start_live: Callable[..., Any]) -> None:
    live = start_live(api_key=("key",))
    assert httpx.get(live.rest + "/openapi.json").status_code == 401
    found = httpx.get(live.rest + "/openapi.json", headers={"Authorization": "Bearer key"}).json()
    scheme = found["components"]["securitySchemes"]["bearer"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, _, operation in operations(found):
        is_open = path == "/version" or path.startswith(("/health", "/ping"))
        assert operation["security"] == ([] if is_open else [{"bearer": []}]), path


def test_a_prefix_of_a_proxy_is_where_the_routes_are(start_live: Callable[..., Any]) -> None:
    live = start_live(root_path="/llm")
    assert document(live.rest)["servers"] == [{"url": "/llm"}]
    assert httpx.get(live.rest + "/v1/models").status_code == 200
