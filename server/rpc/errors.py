"""From a ServiceError to what a gRPC client gets: a status, and google.rpc.Status with details in its metadata."""

import logging
import math

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from server.errors import ServiceError, service_error
from server.rpc.convert import FIELD_PATHS

DOMAIN = "jaxserve"
# Metadata may hold 8 KiB, and a message is in it three times, once with every non-ASCII byte as three characters.
MAX_MESSAGE_BYTES = 1000
PUSHBACK = "grpc-retry-pushback-ms"  # obeyed by the retry policy of gRPC clients; -1 = do not try again

logger = logging.getLogger(__name__)


def rich_status(error: ServiceError) -> status_pb2.Status:
    """ErrorInfo always, BadRequest where a field is at fault, RetryInfo where trying again later can help."""
    message = _clipped(str(error))
    status = status_pb2.Status(code=getattr(grpc.StatusCode, error.told.grpc).value[0], message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.code.upper(), domain=DOMAIN))
    if error.param is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field_path(error.param), description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(error.retry_after * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def field_path(param: str) -> str:
    """Where the field is in a request message: "temperature" -> "sampling.temperature"."""
    return FIELD_PATHS.get(param, param)


async def abort(context: grpc.aio.ServicerContext, error: Exception, request_id: str) -> None:
    """Ends the call with the status of any exception, and never returns. What nobody foresaw goes to the log."""
    told = service_error(error)
    if told.code == "internal_error":
        logger.error("request %s failed", request_id, exc_info=error)
    status = rpc_status.to_status(rich_status(told))
    pushback = -1 if told.retry_after is None else math.ceil(told.retry_after * 1000)
    metadata = (("x-request-id", request_id), (PUSHBACK, str(pushback)))
    await context.abort(status.code, status.details, status.trailing_metadata + metadata)


def _clipped(message: str) -> str:
    encoded = message.encode("utf-8", "replace")
    if len(encoded) <= MAX_MESSAGE_BYTES:
        return encoded.decode()
    return encoded[: MAX_MESSAGE_BYTES - 3].decode("utf-8", "ignore") + "..."
