"""Whatever a route raises -> OpenAI's error body, the status, and the headers that tell a client when to come back."""

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from jaxserve.errors import EngineError, InvalidRequestError
from server.errors import ServiceError, service_error

DEFAULT_RETRY_AFTER = 1.0  # seconds, where the one who refused does not know better
# Failures that the same request meets again. SDKs repeat every 429 and 5xx unless told not to.
FINAL = frozenset({"template_timeout", "numerical_error", "deadline_exceeded"})
_HTTP_CODES = {401: "invalid_api_key", 403: "permission_denied", 404: "not_found", 405: "method_not_allowed"}


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as JSON. Raises ValueError for what JSON cannot hold."""
    return Response(to_json(content, inf_nan_mode="constants"), status, headers, media_type="application/json")


def error_headers(error: ServiceError) -> dict[str, str]:
    """Headers that belong to an error, other than those every response has."""
    headers = {}
    retry_after = error.retry_after
    if retry_after is None and error.told.http in (429, 503):
        retry_after = DEFAULT_RETRY_AFTER
    if retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
        headers["retry-after-ms"] = str(max(1, math.ceil(retry_after * 1000)))
    if error.code in FINAL:
        headers["x-should-retry"] = "false"
    if error.told.http == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def error_response(error: BaseException, headers: Mapping[str, str] | None = None) -> Response:
    """The answer to a request that failed with `error`, whatever it is."""
    told = service_error(error)
    return json_response(told.body(), told.told.http, {**error_headers(told), **(headers or {})})


def install_error_handlers(app: FastAPI) -> None:
    """Errors that routes raise on purpose. What nobody foresaw is caught by `headers.Failures`, which logs it."""

    async def raised(_request: Request, error: Exception) -> Response:
        return error_response(error)

    async def disconnected(_request: Request, _error: Exception) -> Response:
        return error_response(ServiceError("cancelled", "the client went away"))

    app.add_exception_handler(ServiceError, raised)
    app.add_exception_handler(InvalidRequestError, raised)
    app.add_exception_handler(EngineError, raised)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _wrong_parameter)
    app.add_exception_handler(ClientDisconnect, disconnected)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router refuses by itself: no such route, no such method."""
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code)
    method, path = request.method[:20], request.scope["path"][:200]
    if code == "not_found":
        told = ServiceError(code, f"no such route: {method} {path!a}")
    elif code == "method_not_allowed":
        allowed = (error.headers or {}).get("Allow", "")
        told = ServiceError(code, f"{path!a} has no method {method!a}, only {allowed}")
    elif code is not None or 400 <= error.status_code < 500:
        told = ServiceError(code or "invalid_value", str(error.detail))
    else:
        told = service_error(error)
    return error_response(told, error.headers)


async def _wrong_parameter(_request: Request, error: Exception) -> Response:
    """A path or query parameter that FastAPI refused; bodies never come this way."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return error_response(ServiceError("invalid_value", f"{param}: {first['msg']}", param=param))
