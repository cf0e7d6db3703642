"""A request's body -> JSON -> a pydantic model, or a ServiceError that names the fault; nothing is read beyond the cap.

FastAPI's own body handling is not used: it reads without a limit, takes NaN, and answers in a shape of its own.
"""

import asyncio
import json
import math
import re
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from server.errors import ServiceError
from server.rest.call import frontend_of, request_id_of
from server.rest.validation import Path, dotted, shown, validated
from server.settings import MIB

T = TypeVar("T", bound=BaseModel)

BODY_TIMEOUT = 60.0  # seconds from the first read to the last byte
OFF_LOOP_BYTES = 1 << 16  # larger bodies are parsed in a thread, so that the loop goes on between other people's tokens
MAX_CONTAINERS = 1 << 15  # lists and objects in one body: each costs far more to make than its two bytes to send
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
INTEGERS = (-(2**63), 2**64 - 1)  # beyond them no field of any protocol goes


async def read_json(request: Request) -> Any:
    """The body as JSON. Raises ServiceError: unsupported_media_type, payload_too_large, request_timeout, invalid_json,
    and invalid_value for a number that is NaN, infinite or no 64-bit integer (its place as `param`)."""
    body = await _read(request)
    return await _off_loop(len(body), parse_json, body)


async def read_body(request: Request, type_: type[T]) -> T:
    """The body as a `type_`. Raises as `read_json` and `validation.validated` do.

    With settings.unknown_params="warn", fields that `type_` does not know are dropped and logged.
    """
    body = await _read(request)
    warn = frontend_of(request).settings.unknown_params == "warn"
    request_id = request_id_of(request)
    return await _off_loop(len(body), lambda raw: validated(parse_json(raw), type_, warn, request_id), body)


def parse_json(body: bytes) -> Any:
    """Strict JSON (RFC 8259) in UTF-8. Raises ServiceError."""
    if _containers(body) > MAX_CONTAINERS and _containers(_STRINGS.sub(b"", body)) > MAX_CONTAINERS:
        raise ServiceError("invalid_json", f"the body has more than {MAX_CONTAINERS} lists and objects")
    try:
        data = from_json(body, allow_inf_nan=True)  # let in to be found by name
    except ValueError as error:
        data = _with_long_integers(body) if "number out of range" in str(error) else None
        if data is None:
            raise ServiceError("invalid_json", f"the body is not valid JSON: {error}") from None
    _check(data)
    return data


async def _off_loop(size: int, work: Any, body: bytes) -> Any:
    return work(body) if size <= OFF_LOOP_BYTES else await asyncio.to_thread(work, body)


async def _read(request: Request) -> bytes:
    _check_type(request)
    limit = frontend_of(request).settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise _too_large(limit, f"{declared[:20]} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit, "more")
    except TimeoutError:
        raise ServiceError("request_timeout", f"the body did not arrive within {BODY_TIMEOUT:.0f} s") from None
    except ClientDisconnect:
        raise ServiceError("cancelled", "the client went away") from None
    return bytes(body)


def _check_type(request: Request) -> None:
    types = request.headers.getlist("content-type")
    kind, *parameters = [part.strip().lower() for part in ";".join(types).split(";")]
    charset = [part.replace('"', "") for part in parameters if part]
    if len(types) != 1 or kind != "application/json" or charset not in ([], ["charset=utf-8"]):
        sent = shown(", ".join(types)) if types else "missing"
        raise ServiceError(
            "unsupported_media_type",
            f"Content-Type is {sent}; send the body as JSON with the header Content-Type: application/json",
        )
    encodings = ",".join(request.headers.getlist("content-encoding")).strip().lower()
    if encodings not in ("", "identity"):
        raise ServiceError(
            "unsupported_media_type", f"Content-Encoding={shown(encodings)} is not supported; send the body as it is"
        )


def _too_large(limit: int, size: str) -> ServiceError:
    limit_text = f"{limit} bytes" if limit % MIB else f"{limit // MIB} MiB"
    return ServiceError("payload_too_large", f"the body has {size}; this server reads at most {limit_text}")


def _containers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


class _LongInteger:
    """Stands for an integer too long to be parsed, so that the field that holds it can be named."""


def _with_long_integers(body: bytes) -> Any:
    """The body with marks for integers of thousands of digits; None if something else about it is not JSON."""

    def integer(digits: str) -> Any:
        return int(digits) if len(digits) <= 40 else _LongInteger()

    try:
        return json.loads(body, parse_int=integer)
    except (ValueError, RecursionError):
        return None


def _check(data: Any) -> None:
    """Raises ServiceError for a number that no field can hold, naming it."""
    if why := _wrong_number(data):
        raise ServiceError("invalid_value", f"the body {why}")
    left: list[tuple[Any, Any]] = [((), data)] if isinstance(data, dict | list) else []
    while left:
        place, value = left.pop()
        if isinstance(value, list) and _plain(value):
            continue
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, dict | list):
                left.append(((place, key), item))
            elif why := _wrong_number(item):
                param = dotted(_path((place, key)))
                raise ServiceError("invalid_value", f"{param} {why}", param=param)


def _path(place: Any) -> Path:
    """Places are linked: as tuples, those of many deep values would take more memory than the values."""
    path: list[str | int] = []
    while place:
        place, key = place
        path.append(key)
    return tuple(reversed(path))


def _plain(values: list[Any]) -> bool:
    """A list of strings, or of integers in range: the long ones, which need no look at every item."""
    kinds = set(map(type, values))
    return kinds <= {str} or (kinds == {int} and INTEGERS[0] <= min(values) and max(values) <= INTEGERS[1])


def _wrong_number(value: Any) -> str | None:
    if isinstance(value, _LongInteger):
        return "is an integer of more than 64 bits"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number, which NaN, Infinity and numbers beyond 1.8e308 are not"
    if isinstance(value, int) and not INTEGERS[0] <= value <= INTEGERS[1]:
        return "is an integer of more than 64 bits"
    return None
