"""One exception carries all a server said."""

from typing import Any

import grpc
import pytest

from jaxserve.client.errors import ServerError, server_error
from jaxserve.errors import JaxserveError
from server.errors import ServiceError
from server.rpc.errors import rich_status


class FinishedCall:
    """What a grpc.RpcError tells of its call."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Any):
        self.code, self.details, self.trailing_metadata = (lambda: code), (lambda: details), (lambda: metadata)


@pytest.mark.parametrize(
    ("error", "param"),
    [
        (ServiceError("queue_full", "wait", retry_after=1.5), None),
        (ServiceError("invalid_value", "temperature=9", param="temperature"), "temperature"),
        (ServiceError("invalid_value", "cache_salt", param="cache_salt"), "cache_salt"),
        (ServiceError("model_not_found", "who?", param="model"), "model"),
        (ServiceError("internal_error", "sorry"), None),
    ],
)
def test_everything_the_server_said_is_there(error: ServiceError, param: str | None) -> None:
    status = getattr(grpc.StatusCode, error.told.grpc)
    details = (("grpc-status-details-bin", rich_status(error).SerializeToString()), ("x-request-id", "abc"))
    raised = server_error(FinishedCall(status, str(error), details))
    assert isinstance(raised, JaxserveError)
    assert (raised.code, raised.status, str(raised)) == (error.code, status, str(error))
    assert (raised.param, raised.retry_after, raised.request_id) == (param, error.retry_after, "abc")


@pytest.mark.parametrize("metadata", [None, ()])
def test_what_never_reached_a_server_has_the_status_for_a_code(metadata: Any) -> None:
    raised = server_error(FinishedCall(grpc.StatusCode.UNAVAILABLE, "no connection", metadata))
    assert (raised.code, str(raised), raised.param, raised.retry_after, raised.request_id) == (
        "unavailable",
        "no connection",
        None,
        None,
        "",
    )


def test_a_status_without_words_is_told_by_its_code() -> None:
    raised: ServerError = server_error(FinishedCall(grpc.StatusCode.DEADLINE_EXCEEDED, "", ()))
    assert str(raised) == raised.code == "deadline_exceeded"
