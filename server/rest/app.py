"""A front end -> the public REST application: OpenAI's routes, those users of vLLM know, health, and the playground."""

from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from server.frontend.frontend import Frontend
from server.rest import (
    chat,
    completions,
    embeddings,
    engine_status,
    health_routes,
    models,
    playground,
    tokenization,
)
from server.rest.auth import OPEN_PATHS, ApiKeys
from server.rest.errors import install_error_handlers
from server.rest.headers import REQUEST_ID, Failures, RequestIds
from server.rest.openapi import describe

EXPOSED_HEADERS = (REQUEST_ID, "Retry-After", "retry-after-ms", "x-should-retry")  # to pages of other origins

DESCRIPTION = """One language model, for clients of OpenAI's API and of vLLM.

Headers that the generating routes read: X-Request-Timeout, seconds until the request is ended with 504; X-Priority,
lower runs first where the server schedules by priority; traceparent. X-Request-Id is read by every route, and every
response has one.
"""


def build_app(frontend: Frontend) -> FastAPI:
    """The application for the public port. Routes find `frontend` as app.state.frontend."""
    settings = frontend.settings
    app = bare_app("jaxserve", frontend, OPEN_PATHS, settings.root_path, DESCRIPTION)
    for part in (completions, chat, models, tokenization, embeddings, engine_status, health_routes):
        app.include_router(part.router)
    if settings.playground:
        app.include_router(playground.router)
    # From the inside out. Browsers ask for permission without a key, so CORS answers before keys are looked at.
    app.add_middleware(ApiKeys, keys=settings.api_key, open_paths=OPEN_PATHS)
    app.add_middleware(Failures)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(RequestIds)
    return app


def bare_app(
    title: str, frontend: Frontend, open_paths: frozenset[str], root_path: str = "", description: str = ""
) -> FastAPI:
    """An application without routes, whose errors have OpenAI's shape and whose pages load nothing from elsewhere.

    root_path: what a proxy strips from paths before they come here; only the OpenAPI document has to know.
    """
    # Redirects to a path with or without a slash would be built from the Host header.
    servers = [{"url": root_path}] if root_path else None
    app = FastAPI(
        title=title, description=description, servers=servers, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.frontend = frontend
    install_error_handlers(app)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app, open_paths)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app
