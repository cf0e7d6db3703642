"""Whatever goes wrong in a route, the client gets OpenAI's error body, a status, and when to come back."""

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from jaxserve.errors import (
    ChatTemplateError,
    ChatTemplateLimitError,
    ConfigError,
    EngineError,
    InvalidRequestError,
    NumericalError,
    PromptTooLongError,
)
from server.errors import CODES, ServiceError
from server.rest.app import bare_app
from server.rest.headers import Failures, RequestIds
from server.rest.listener import bind, serve_http
from server.settings import ServerSettings

SECRET = "/home/someone/model at 0x7f00"


@pytest.fixture
def failing() -> FastAPI:
    """GET /fail raises app.state.error; /late does so after the first chunk."""
    app = bare_app("failing", SimpleNamespace(settings=ServerSettings()), frozenset())  # type: ignore[arg-type]
    app.add_middleware(Failures)
    app.add_middleware(RequestIds)

    @app.get("/fail")
    async def fail() -> None:
        raise app.state.error

    @app.get("/late")
    async def late() -> StreamingResponse:
        async def chunks() -> Any:
            yield b"begun"
            raise app.state.error

        return StreamingResponse(chunks())

    return app


def ask(app: FastAPI, error: BaseException, path: str = "/fail", **headers: str) -> httpx.Response:
    app.state.error = error

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(get())


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_its_status_and_body(failing: FastAPI, code: str) -> None:
    answer = ask(failing, ServiceError(code, "why", param="field"))
    assert answer.status_code == CODES[code].http
    assert answer.json() == {"error": {"message": "why", "type": CODES[code].type, "param": "field", "code": code}}
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (InvalidRequestError("n=0 must be in 1..128", "n", 0), 400, "invalid_value", "n"),
        (PromptTooLongError("too long", "prompt", 9), 400, "context_length_exceeded", "prompt"),
        (ChatTemplateLimitError("chat template took longer than 5 s", "messages"), 500, "template_timeout", "messages"),
        (ChatTemplateError("refused: longer than my memory", "messages"), 400, "invalid_value", "messages"),
        (NumericalError("NaN logits"), 500, "numerical_error", None),
        (EngineError("gone"), 500, "engine_dead", None),
    ],
)
def test_errors_of_the_engine_have_codes(
    failing: FastAPI, error: Exception, status: int, code: str, param: str | None
) -> None:
    answer = ask(failing, error)
    assert answer.status_code == status
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)


@pytest.mark.parametrize(
    ("wanted", "seconds", "milliseconds"), [(0.2, "1", "200"), (2.0, "2", "2000"), (2.1, "3", "2100")]
)
def test_retry_after_is_whole_seconds_upwards_and_exact_in_milliseconds(
    failing: FastAPI, wanted: float, seconds: str, milliseconds: str
) -> None:
    headers = ask(failing, ServiceError("queue_full", "full", retry_after=wanted)).headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == (seconds, milliseconds)
    assert "x-should-retry" not in headers


@pytest.mark.parametrize("code", [code for code, told in CODES.items() if told.http in (429, 503)])
def test_who_may_come_back_is_always_told_when(failing: FastAPI, code: str) -> None:
    assert ask(failing, ServiceError(code, "later")).headers["retry-after"] == "1"


@pytest.mark.parametrize("code", ["template_timeout", "numerical_error", "deadline_exceeded"])
def test_what_would_fail_again_is_not_to_be_repeated(failing: FastAPI, code: str) -> None:
    headers = ask(failing, ServiceError(code, "final")).headers
    assert headers["x-should-retry"] == "false" and "retry-after" not in headers


@pytest.mark.parametrize("error", [RuntimeError(SECRET), KeyError(SECRET), ConfigError(SECRET), MemoryError(SECRET)])
def test_what_nobody_foresaw_tells_the_client_nothing_and_the_log_everything(
    failing: FastAPI, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    answer = ask(failing, error, **{"X-Request-Id": "the-one"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "someone" not in answer.text and "0x7f" not in answer.text
    logged = [record for record in caplog.records if record.exc_info and record.levelno == logging.ERROR]
    assert len(logged) == 1
    assert "the-one" in logged[0].getMessage() and logged[0].exc_info[1] is error  # type: ignore[index]


def test_a_response_that_fails_after_it_began_is_cut_off_and_logged_once(
    failing: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    failing.state.error = RuntimeError(SECRET)

    async def get() -> bytes:
        server = await serve_http(failing, ServerSettings(), bind("127.0.0.1", 0))
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /late HTTP/1.1\r\nHost: x\r\n\r\n")
            received = await reader.read()
            writer.close()
            return received
        finally:
            await server.stop(0.0)

    received = asyncio.run(get())
    assert received.startswith(b"HTTP/1.1 200") and received.endswith(b"begun\r\n")
    assert not received.endswith(b"0\r\n\r\n")  # the end of a complete body
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_an_unknown_route_is_named(failing: FastAPI) -> None:
    answer = ask(failing, RuntimeError(), "/nowhere")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found" and "/nowhere" in answer.json()["error"]["message"]


def test_a_wrong_method_is_told_the_right_one(live: Any) -> None:
    answer = httpx.get(live.rest + "/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path", ["/v1/models/", "/health/", "//health", "/v1/completions/", "/docs", "/redoc", "/metrics", "/admin/status"]
)
def test_no_route_is_reached_by_another_spelling_and_none_leads_elsewhere(live: Any, path: str) -> None:
    answer = httpx.get(live.rest + path, headers={"Host": "evil.example"})
    assert answer.status_code == 404 and "location" not in answer.headers
    assert answer.json()["error"]["code"] == "not_found"
