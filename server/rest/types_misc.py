"""Types of the smaller routes, for bodies and for /openapi.json: errors, models, embeddings, health.

`RequestBody` is what every request model is made of. `json_body` and `ERROR_RESPONSES` describe a route whose body is
read by `body.read_body` and whose answer is written by hand.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema

from server.rest.fail_fast import fail_fast

REF_TEMPLATE = "#/components/schemas/{model}"
REQUEST_MODELS: dict[str, type[BaseModel]] = {}  # named by `json_body`; the schemas /openapi.json must hold


class RequestBody(BaseModel):
    """A JSON object from a client: unknown fields, NaN and infinity are refused, and no type is turned into another.

    A collection stops at its first wrong item. Otherwise a list of a million wrong items makes a million errors, of
    which one is told, after seconds in which this process does nothing else.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return fail_fast(handler(source))


class ErrorDetails(BaseModel):
    """code: of server.errors.CODES. param: the field at fault, as the client spells it."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """What every failed request is answered with."""

    error: ErrorDetails


_STATUSES: dict[int | str, str] = {
    400: "The request is malformed, or a value in it cannot be honoured",
    401: "No API key, or a wrong one",
    403: "Not from where the request comes",
    404: "No such model or route",
    408: "The body did not arrive in time",
    413: "The body is larger than this server reads",
    415: "The body is not plain JSON, or does not say that it is",
    429: "The queue is full: try again after Retry-After seconds",
    500: "The server failed at this request",
    503: "Not ready yet, or shutting down: try again after Retry-After seconds",
    504: "The deadline passed before the answer was complete",
    "4XX": "Refused",
}
Responses = dict[int | str, dict[str, Any]]


def error_responses(*statuses: int | str) -> Responses:
    """The `responses=` of a route that fails with these only."""
    return {status: {"model": ErrorResponse, "description": _STATUSES[status]} for status in statuses}


ERROR_RESPONSES = error_responses(*_STATUSES)  # of a route that generates


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra=` of a route whose body `read_body(request, model)` reads."""
    known = REQUEST_MODELS.setdefault(model.__name__, model)
    assert known is model, f"two request models are called {model.__name__}"
    schema = {"$ref": REF_TEMPLATE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class ModelCard(BaseModel):
    """One served name of the model."""

    id: str
    object: Literal["model"] = "model"
    created: int  # Unix seconds
    owned_by: str = "jaxserve"
    root: str  # what the server was started with
    parent: str | None = None
    max_model_len: int | None = None  # tokens; None until the engine was ready for the first time


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


TokenId = Annotated[int, Field(ge=0)]


class EmbeddingRequest(RequestBody):
    model: str | None = None
    input: str | list[str] | list[TokenId] | list[list[TokenId]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str  # base64: of little-endian float32


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class HealthResponse(BaseModel):
    """cause: what is wrong, None when nothing is. Further fields are the numbers behind it."""

    model_config = ConfigDict(extra="allow")

    status: Literal["ok", "unavailable"]
    cause: str | None


class VersionResponse(BaseModel):
    version: str
