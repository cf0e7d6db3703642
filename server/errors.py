"""What the server refuses or fails at, in the terms of every protocol: one table for REST and gRPC.

A `ServiceError` carries a code out of `CODES`; what the engine raises (`InvalidRequestError`, `EngineError`) becomes
one through `service_error`. Messages name the field and the value, never a path, an address or a traceback.
"""

from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.errors import (
    ChatTemplateLimitError,
    EmptyPromptError,
    EngineError,
    InvalidRequestError,
    JaxserveError,
    NumericalError,
    PromptTooLongError,
    TokenOutOfRangeError,
)

GrpcStatus = Literal[
    "INVALID_ARGUMENT",
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "NOT_FOUND",
    "RESOURCE_EXHAUSTED",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
]


@dataclass(frozen=True)
class Code:
    """How one kind of error is told. type: the `type` of OpenAI's error body."""

    http: int
    grpc: GrpcStatus
    type: str = "invalid_request_error"


CODES: dict[str, Code] = {
    # The client's
    "invalid_json": Code(400, "INVALID_ARGUMENT"),
    "invalid_value": Code(400, "INVALID_ARGUMENT"),
    "missing_required_parameter": Code(400, "INVALID_ARGUMENT"),
    "unknown_parameter": Code(400, "INVALID_ARGUMENT"),
    "unsupported_parameter": Code(400, "INVALID_ARGUMENT"),
    "unsupported_model": Code(400, "INVALID_ARGUMENT"),
    "empty_prompt": Code(400, "INVALID_ARGUMENT"),
    "context_length_exceeded": Code(400, "INVALID_ARGUMENT"),
    "token_out_of_range": Code(400, "INVALID_ARGUMENT"),
    "invalid_api_key": Code(401, "UNAUTHENTICATED", "authentication_error"),
    "permission_denied": Code(403, "PERMISSION_DENIED", "permission_error"),
    "model_not_found": Code(404, "NOT_FOUND"),
    "not_found": Code(404, "NOT_FOUND"),
    "method_not_allowed": Code(405, "UNIMPLEMENTED"),
    "request_timeout": Code(408, "DEADLINE_EXCEEDED"),
    "payload_too_large": Code(413, "RESOURCE_EXHAUSTED"),
    "unsupported_media_type": Code(415, "INVALID_ARGUMENT"),
    "cancelled": Code(499, "CANCELLED"),
    # The moment's: trying again later can help
    "queue_full": Code(429, "RESOURCE_EXHAUSTED", "rate_limit_error"),
    "not_ready": Code(503, "UNAVAILABLE", "service_unavailable"),
    "draining": Code(503, "UNAVAILABLE", "service_unavailable"),
    "deadline_exceeded": Code(504, "DEADLINE_EXCEEDED", "timeout_error"),
    # Ours
    "template_timeout": Code(500, "INTERNAL", "server_error"),
    "numerical_error": Code(500, "INTERNAL", "server_error"),
    "engine_dead": Code(500, "UNAVAILABLE", "server_error"),
    "internal_error": Code(500, "INTERNAL", "server_error"),
}


class ServiceError(JaxserveError):
    """A request that gets an error for an answer.

    code: of CODES. param: the offending field, as the client spells it. retry_after: seconds until it makes sense to
    try again.
    """

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def told(self) -> Code:
        return CODES[self.code]

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {"message": str(self), "type": self.told.type, "param": self.param, "code": self.code},
        }


def service_error(error: BaseException) -> ServiceError:
    """Any exception as a ServiceError; what nobody foresaw becomes an internal_error that tells nothing."""
    match error:
        case ServiceError():
            return error
        case ChatTemplateLimitError():
            return ServiceError("template_timeout", str(error), param=error.field)
        case InvalidRequestError():
            return ServiceError(_REQUEST_CODES.get(type(error), "invalid_value"), str(error), param=error.field)
        case NumericalError():
            return ServiceError("numerical_error", str(error))
        case EngineError():
            return ServiceError("engine_dead", str(error))
    return ServiceError("internal_error", "the server failed at this request; its log says why")


_REQUEST_CODES: dict[type, str] = {
    EmptyPromptError: "empty_prompt",
    PromptTooLongError: "context_length_exceeded",
    TokenOutOfRangeError: "token_out_of_range",
}
