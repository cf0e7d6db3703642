"""A REST request's headers -> how its call is treated, and the front end that takes it."""

import math
import re
from typing import Any

from starlette.requests import Request

from server.errors import ServiceError
from server.frontend.frontend import CallOptions, Frontend

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_PRIORITY = re.compile(r"[+-]?[0-9]{1,10}")


def frontend_of(request: Request) -> Frontend:
    return request.app.state.frontend


def request_id_of(request: Request) -> str:
    """The X-Request-Id of this request's response: the client's where it is usable, else ours."""
    return request.scope["state"]["request_id"]


def call_options(request: Request, endpoint: str, **fields: Any) -> CallOptions:
    """What the headers say, under `fields`; a field that is None says nothing.

    Headers: X-Request-Timeout in seconds, X-Priority, X-Request-Id, traceparent. Raises ServiceError (invalid_value)
    naming the header. A traceparent that does not follow W3C Trace Context is left out, as that standard demands.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if "timeout" not in given and (text := _single(request, "X-Request-Timeout")) is not None:
        given["timeout"] = _seconds(text)
    if "priority" not in given and (text := _single(request, "X-Priority")) is not None:
        given["priority"] = _priority(text)
    trace = request.headers.getlist("traceparent")
    return CallOptions(
        endpoint=endpoint,
        client_request_id=request_id_of(request),
        traceparent=trace[0] if len(trace) == 1 and _TRACEPARENT.fullmatch(trace[0]) else None,
        **given,
    )


def _single(request: Request, name: str) -> str | None:
    values = request.headers.getlist(name)
    if len(values) > 1:
        raise ServiceError("invalid_value", f"{name} is given {len(values)} times", param=name)
    return values[0] if values else None


def _seconds(text: str) -> float:
    try:
        seconds = float(text) if len(text) <= 40 else math.nan
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        name = "X-Request-Timeout"
        raise ServiceError("invalid_value", f"{name}={text[:40]!a} must be a positive number of seconds", param=name)
    return seconds


def _priority(text: str) -> int:
    priority = int(text) if _PRIORITY.fullmatch(text) else None
    if priority is None or not -(2**31) <= priority < 2**31:
        raise ServiceError("invalid_value", f"X-Priority={text[:40]!a} must be a 32-bit integer", param="X-Priority")
    return priority
