"""A front end -> the application for the admin port: /metrics, /health, /admin/...

With API keys set, /admin needs one too; metrics and health stay open to whoever reaches the port.
"""

import dataclasses
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel
from starlette.responses import Response

from server.admin.process_state import process_state
from server.admin.same_host import SameHost
from server.frontend.frontend import Frontend
from server.rest import health_routes
from server.rest.app import bare_app
from server.rest.auth import HEALTH_PATHS, ApiKeys
from server.rest.body import read_body
from server.rest.call import frontend_of
from server.rest.errors import json_response
from server.rest.headers import Failures, RequestIds
from server.rest.types_misc import RequestBody, error_responses, json_body
from server.settings import ServerSettings

OPEN_PATHS = HEALTH_PATHS | {"/metrics", "/version"}
SECRETS = ("api_key",)  # settings that are shown as present or not

router = APIRouter()
_REFUSED = error_responses(401, 403, 500)


class AbortRequest(RequestBody):
    request_id: str


class Done(BaseModel):
    status: Literal["ok"] = "ok"


def build_admin_app(frontend: Frontend) -> FastAPI:
    """The application for the admin port. Routes find `frontend` as app.state.frontend."""
    app = bare_app("jaxserve admin", frontend, OPEN_PATHS)
    app.include_router(router)
    app.include_router(health_routes.router)
    app.add_middleware(ApiKeys, keys=frontend.settings.api_key, open_paths=OPEN_PATHS)
    app.add_middleware(SameHost, admin_host=frontend.settings.admin_host)
    app.add_middleware(Failures)
    app.add_middleware(RequestIds)
    return app


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}, **error_responses(403, 500)},
)
async def metrics(request: Request) -> Response:
    """Prometheus text, or OpenMetrics for who accepts it."""
    wants_openmetrics = "application/openmetrics-text" in request.headers.get("accept", "")
    body, content_type = frontend_of(request).metrics.render(wants_openmetrics)
    return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})


@router.post("/admin/reset_prefix_cache", responses=_REFUSED)
async def reset_prefix_cache(request: Request) -> Done:
    """Forgets every cached prefix that no running request uses."""
    frontend_of(request).engine.reset_prefix_cache()
    return Done()


@router.post(
    "/admin/abort", responses=error_responses(400, 401, 403, 408, 413, 415, 500), openapi_extra=json_body(AbortRequest)
)
async def abort(request: Request) -> Done:
    """Ends a request by the id its response carries, whichever front end it came through. Unknown ids are ignored."""
    body = await read_body(request, AbortRequest)
    frontend_of(request).abort(body.request_id)
    return Done()


@router.post("/admin/drain", responses=_REFUSED)
async def drain(request: Request) -> Done:
    """Unready from now on: what runs is finished, nothing new is accepted."""
    frontend_of(request).drain_requested()
    return Done()


@router.get("/admin/status", response_model=dict[str, Any], responses=_REFUSED)
async def status(request: Request) -> Response:
    """What this front end knows and holds: the engine, its counts and memory, and the settings without secrets."""
    frontend = frontend_of(request)
    info, engine = frontend.engine.info, frontend.engine.status
    return json_response(
        {
            "models": frontend.model_names,
            "root": frontend.model_root,
            "created": frontend.created,
            "draining": frontend.draining,
            "health": dataclasses.asdict(frontend.health.ready()),
            "engine": dataclasses.asdict(engine),
            "info": None if info is None else dataclasses.asdict(info),
            "process": {**dataclasses.asdict(process_state()), "open_calls": len(frontend.open_calls)},
            "settings": _shown_settings(frontend.settings),
        }
    )


def _shown_settings(settings: ServerSettings) -> dict[str, Any]:
    shown = settings.model_dump(mode="json")
    return shown | {name: f"({len(shown[name])} set)" for name in SECRETS}
