"""GET /health, /health/live, /health/ready, /ping, /version: 200 or 503, and why. On the public and the admin port.

The body is not OpenAI's error: probes read the status, people read the cause.
"""

from fastapi import APIRouter, Request
from starlette.responses import Response

import jaxserve
from server.frontend.health import HealthReport
from server.rest.call import frontend_of
from server.rest.errors import json_response
from server.rest.types_misc import HealthResponse, Responses, VersionResponse, error_responses

RETRY_AFTER = 1  # seconds

router = APIRouter()
_UNAVAILABLE: Responses = {503: {"model": HealthResponse, "description": "Not now; `cause` says why"}}


@router.get("/health/live", response_model=HealthResponse, responses=_UNAVAILABLE)
async def live(request: Request) -> Response:
    """503 where only a restart from outside helps."""
    return _answer(frontend_of(request).health.live())


@router.get("/health/ready", response_model=HealthResponse, responses=_UNAVAILABLE)
async def ready(request: Request) -> Response:
    """200 where a request sent now would be served."""
    return _answer(frontend_of(request).health.ready())


router.add_api_route("/health", ready, response_model=HealthResponse, responses=_UNAVAILABLE)
router.add_api_route("/ping", ready, response_model=HealthResponse, responses=_UNAVAILABLE)


@router.get("/version", responses=error_responses())
async def version() -> VersionResponse:
    """The version of jaxserve."""
    return VersionResponse(version=jaxserve.__version__)


def _answer(report: HealthReport) -> Response:
    body = {**report.details, "status": "ok" if report.ok else "unavailable", "cause": report.cause}
    headers = {"Cache-Control": "no-store"}
    if not report.ok:
        headers["Retry-After"] = str(RETRY_AFTER)
    return json_response(body, 200 if report.ok else 503, headers)
