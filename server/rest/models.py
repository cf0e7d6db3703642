"""GET /v1/models and /v1/models/{id}: the names under which this server answers for its one model."""

from fastapi import APIRouter, Request

from server.errors import ServiceError
from server.frontend.frontend import Frontend
from server.rest.call import frontend_of
from server.rest.types_misc import ModelCard, ModelList, error_responses

router = APIRouter()


@router.get("/v1/models", responses=error_responses(401, 500))
async def list_models(request: Request) -> ModelList:
    """Every name this server answers to. Answers while the engine loads, too."""
    frontend = frontend_of(request)
    return ModelList(data=[_card(frontend, name) for name in frontend.model_names])


@router.get("/v1/models/{id:path}", responses=error_responses(401, 404, 500))
async def retrieve_model(request: Request, id: str) -> ModelCard:
    """One of them."""
    frontend = frontend_of(request)
    if not id:  # which elsewhere means: the model, whatever its name
        raise ServiceError("not_found", "no such route: /v1/models/; its list is at /v1/models")
    frontend.check_model(id)
    return _card(frontend, id)


def _card(frontend: Frontend, name: str) -> ModelCard:
    info = frontend.engine.info
    return ModelCard(
        id=name,
        created=frontend.created,
        root=frontend.model_root,
        max_model_len=None if info is None else info.limits.max_model_len,
    )
