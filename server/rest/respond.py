"""The HTTP side of both generation routes: answers whole or as events, which end when the client is gone."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server.errors import ServiceError
from server.rest.answer import Form, chunks, whole
from server.rest.errors import json_response
from server.rest.headers import sanitised_request_id
from server.rest.sse import EventStream, disconnected
from server.rest.types_misc import ERROR_RESPONSES

T = TypeVar("T")


async def respond(request: Request, form: Form) -> Response:
    """The answer to one call. Raises ServiceError, as long as nothing was sent."""
    settings = form.call.frontend.settings
    if not form.call.body.stream:
        return json_response(await unless_gone(request, whole(form)))
    return EventStream(chunks(form), keep_alive=settings.sse_keep_alive)


def use_request_id(request: Request, given: str | None) -> None:
    """The body's request_id counts like the header X-Request-Id."""
    if given is not None:
        sent = [(b"x-request-id", given.encode("utf-8", "replace"))]
        request.scope["state"]["request_id"] = sanitised_request_id(sent)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects: ServiceError cancelled.

    The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ServiceError("cancelled", "the client went away")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
    return task.result()


def event_stream_responses(model: type[BaseModel], chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that answers with `model`, or with events of `chunk`."""
    described = f"One `data:` line each: {chunk.__name__} objects, then `[DONE]`. {(chunk.__doc__ or '').strip()}"
    events = {"schema": {"type": "string", "description": described}}
    return {200: {"model": model, "content": {"text/event-stream": events}}, **ERROR_RESPONSES}
