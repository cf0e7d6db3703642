"""The generation routes of the shared front end, as a plain client and as OpenAI's client use them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from server.rest.types_chat import ChatChunk, ChatResponse
from server.rest.types_completion import CompletionResponse


@dataclass
class Route:
    """base: the body of every request, under what a test gives. Answers must be what /openapi.json promises."""

    http: httpx.Client
    url: str
    base: dict[str, Any]
    answer: type[BaseModel]
    chunk: type[BaseModel]

    def post(self, **body: Any) -> httpx.Response:
        return self.http.post(self.url, json={**self.base, **body})

    def whole(self, **body: Any) -> dict[str, Any]:
        response = self.post(**body)
        assert response.status_code == 200, response.text
        self.answer.model_validate_json(response.content, strict=True, extra="forbid")
        return response.json()

    def events(self, **body: Any) -> list[dict[str, Any]]:
        """Every event of the stream but the last, which must be [DONE]."""
        with self.http.stream("POST", self.url, json={**self.base, "stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        events = [line.removeprefix("data: ") for line in lines[:-1]]
        for event in events:
            self.chunk.model_validate_json(event, strict=True, extra="forbid")
        return [json.loads(event) for event in events]

    def refusal(self, **body: Any) -> tuple[str, str | None]:
        """(code, param) of the 400 this gets."""
        response = self.post(**body)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        return error["code"], error["param"]


@pytest.fixture
def http(live: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.rest, timeout=60) as client:
        yield client


@pytest.fixture
def make_sdk(live: Any) -> Iterator[Callable[[bool], openai.OpenAI]]:
    """make_sdk(strict): OpenAI's client; strict = an answer that its types forbid is an error."""
    clients: list[openai.OpenAI] = []

    def make(strict: bool) -> openai.OpenAI:
        clients.append(
            openai.OpenAI(base_url=live.rest + "/v1", api_key="x", max_retries=0, _strict_response_validation=strict)
        )
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def sdk(make_sdk: Callable[[bool], openai.OpenAI]) -> openai.OpenAI:
    return make_sdk(True)


@pytest.fixture
def completions(http: httpx.Client) -> Route:
    base = {"prompt": "The quick brown", "temperature": 0, "max_tokens": 8}
    return Route(http, "/v1/completions", base, CompletionResponse, CompletionResponse)


@pytest.fixture
def chat(http: httpx.Client) -> Route:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick brown fox?"}]
    base = {"messages": messages, "temperature": 0, "max_tokens": 8}
    return Route(http, "/v1/chat/completions", base, ChatResponse, ChatChunk)
