"""From the status a call ended with to one exception that carries all the server said."""

from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from jaxserve.errors import JaxserveError

DETAILS = "grpc-status-details-bin"


class ServerError(JaxserveError):
    """A call that the server refused or could not finish, or that never reached it.

    code         the server's word for it, such as "queue_full" or "context_length_exceeded"; where the call never
                 reached one, gRPC's: "unavailable", "deadline_exceeded"
    status       the gRPC status code
    param        the parameter at fault, None where it is none
    retry_after  seconds until trying again makes sense, None where the server named no time
    request_id   x-request-id, to be looked up in the server's log; "" where the call never reached it
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: grpc.StatusCode,
        param: str | None = None,
        retry_after: float | None = None,
        request_id: str = "",
    ):
        super().__init__(message)
        self.code = code
        self.status = status
        self.param = param
        self.retry_after = retry_after
        self.request_id = request_id


def server_error(error: Any) -> ServerError:
    """error: the grpc.RpcError of a finished call, blocking or asyncio."""
    metadata = {key: value for key, value in error.trailing_metadata() or ()}
    code, param, retry_after = error.code().name.lower(), None, None
    for detail in status_pb2.Status.FromString(metadata.get(DETAILS, b"")).details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            code = info.reason.lower()
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            request = error_details_pb2.BadRequest()
            detail.Unpack(request)
            param = request.field_violations[0].field.removeprefix("sampling.").removeprefix("options.")
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    return ServerError(
        code,
        error.details() or code,
        status=error.code(),
        param=param,
        retry_after=retry_after,
        request_id=metadata.get("x-request-id", ""),
    )
