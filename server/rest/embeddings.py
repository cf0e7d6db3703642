"""POST /v1/embeddings: the route and its types. A model that only generates has no vectors to give, and says so."""

from fastapi import APIRouter, Request

from server.errors import ServiceError
from server.rest.body import read_body
from server.rest.call import frontend_of
from server.rest.types_misc import EmbeddingRequest, EmbeddingResponse, error_responses, json_body

router = APIRouter()


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingResponse,
    responses=error_responses(400, 401, 404, 408, 413, 415, 500),
    openapi_extra=json_body(EmbeddingRequest),
)
async def embeddings(request: Request) -> EmbeddingResponse:
    """400 unsupported_model, since the models this server runs generate text."""
    body = await read_body(request, EmbeddingRequest)
    name = frontend_of(request).check_model(body.model)
    raise ServiceError(
        "unsupported_model",
        f"model {name!r} generates text and has no embeddings; serve an embedding model for them",
        param="model",
    )
