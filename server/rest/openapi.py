"""/openapi.json: FastAPI's description of the routes, with the request bodies that FastAPI does not read itself."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

import jaxserve
from server.rest.types_misc import REF_TEMPLATE, REQUEST_MODELS

_KEY = {"bearer": {"type": "http", "scheme": "bearer"}}
_FASTAPIS_OWN = ("HTTPValidationError", "ValidationError")  # of the 422 that `errors` answers as a 400


def describe(app: FastAPI, open_paths: frozenset[str]) -> dict[str, Any]:
    """The OpenAPI document of `app`; every path but the open ones asks for the API key, where the server has one."""
    document = get_openapi(
        title=app.title,
        version=jaxserve.__version__,
        description=app.description,
        routes=app.routes,
        servers=app.servers,
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in _FASTAPIS_OWN:
        schemas.pop(name, None)
    for name, schema in _request_schemas(str(document["paths"])).items():
        if schemas.setdefault(name, schema) != schema:
            raise RuntimeError(f"two different types are called {name} in /openapi.json")
    keys = bool(app.state.frontend.settings.api_key)
    if keys:
        components["securitySchemes"] = _KEY
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if keys:
                operation["security"] = [] if path in open_paths else [{name: []} for name in _KEY]
    return document


def _request_schemas(paths: str) -> dict[str, Any]:
    """The schemas of the bodies that `paths` refer to, and of what these hold."""
    models = [
        (model, "validation")
        for name, model in REQUEST_MODELS.items()
        if f"'{REF_TEMPLATE.format(model=name)}'" in paths
    ]
    _, document = models_json_schema(models, ref_template=REF_TEMPLATE)  # type: ignore[arg-type]
    return document.get("$defs", {})
