"""A ServiceError becomes a status whose details say the same as the body REST sends."""

import asyncio
import logging
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from jaxserve.errors import EngineError, NumericalError, PromptTooLongError
from server.errors import CODES, ServiceError
from server.rpc.errors import abort, field_path, rich_status


class AbortedError(Exception):
    pass


class Context:
    """What `abort` needs of a grpc.aio.ServicerContext."""

    async def abort(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, Any], ...]) -> None:
        self.code, self.details, self.metadata = code, details, dict(metadata)
        raise AbortedError


def aborted(error: Exception) -> Context:
    context = Context()
    with pytest.raises(AbortedError):
        asyncio.run(abort(context, error, "abc"))
    return context


def details(error: ServiceError) -> dict[str, Any]:
    found = {}
    for detail in rich_status(error).details:
        name = detail.TypeName().rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        detail.Unpack(found[name])
    return found


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_a_status_and_is_named_in_capitals(code: str) -> None:
    status = rich_status(ServiceError(code, "why"))
    assert status.code == getattr(grpc.StatusCode, CODES[code].grpc).value[0] != 0
    assert status.message == "why"
    info = details(ServiceError(code, "why"))["ErrorInfo"]
    assert (info.reason, info.domain) == (code.upper(), "jaxserve")


def test_field_and_retry_are_told_only_where_there_are_any() -> None:
    assert details(ServiceError("invalid_value", "why")).keys() == {"ErrorInfo"}
    full = details(ServiceError("queue_full", "why", param="n", retry_after=1.25))
    [violation] = full["BadRequest"].field_violations
    assert (violation.field, violation.description) == ("sampling.n", "why")
    assert full["RetryInfo"].retry_delay.ToMilliseconds() == 1250


@pytest.mark.parametrize(
    ("param", "path"),
    [
        ("temperature", "sampling.temperature"),
        ("cache_salt", "options.cache_salt"),
        ("tokens", "token_ids"),
        ("model", "model"),
        ("messages", "messages"),
    ],
)
def test_field_is_told_by_its_place_in_the_message(param: str, path: str) -> None:
    assert field_path(param) == path


@pytest.mark.parametrize("letter", ["a", "é", "日", "😀", "\ud800"])
def test_longest_message_fits_into_the_metadata(letter: str) -> None:
    context = aborted(ServiceError("invalid_value", letter * 100_000, param="stop"))
    percent_encoded = 3 * len(context.details.encode())
    in_base64 = 4 * len(context.metadata["grpc-status-details-bin"]) / 3
    assert percent_encoded + in_base64 < 8000
    assert context.details.endswith("...")


def test_what_nobody_foresaw_is_logged_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        context = aborted(RuntimeError("secret at 0x7f00"))
    assert context.code is grpc.StatusCode.INTERNAL
    assert "secret" not in context.details + str(context.metadata)
    assert "secret" in caplog.text and "abc" in caplog.text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PromptTooLongError("too long", "prompt", 9), "INVALID_ARGUMENT"),
        (NumericalError("NaN"), "INTERNAL"),
        (EngineError("died"), "UNAVAILABLE"),
    ],
)
def test_errors_of_the_engine_are_told_and_not_logged(
    error: Exception, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    context = aborted(error)
    assert (context.code.name, context.details) == (code, str(error))
    assert caplog.records == []


def test_the_retries_of_grpc_itself_wait_as_long_as_told_or_stay_out() -> None:
    assert aborted(ServiceError("not_ready", "why", retry_after=2)).metadata["grpc-retry-pushback-ms"] == "2000"
    assert aborted(ServiceError("engine_dead", "why")).metadata["grpc-retry-pushback-ms"] == "-1"


def test_id_of_the_call_goes_along() -> None:
    assert aborted(ServiceError("invalid_value", "why")).metadata["x-request-id"] == "abc"
