"""Middleware every request passes: an X-Request-Id in and out, and an answer in our shape to what nobody foresaw.

Pure ASGI: they add two calls to a request, none to a chunk of a stream but a look at its type.
"""

import logging
import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.rest.errors import error_response

log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"
_USABLE = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def new_request_id() -> str:
    return uuid.uuid4().hex


def sanitised_request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's id if there is one and it can stand in a log and a header as it is, else an id of our own."""
    sent = [value for name, value in headers if name == b"x-request-id"]
    return sent[0].decode() if len(sent) == 1 and _USABLE.fullmatch(sent[0]) else new_request_id()


class RequestIds:
    """Puts the id into scope["state"]["request_id"], where a route may change it, and from there on the response."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        state = scope.setdefault("state", {})
        state["request_id"] = sanitised_request_id(scope["headers"])

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = state["request_id"]
            await send(message)

        await self.app(scope, receive, send_with_id)


class Failures:
    """Answers internal_error where a route fails in a way nobody foresaw, and logs the traceback with the request's id.

    A response that has begun cannot be answered otherwise any more: its connection is closed, so that the client sees
    that it is incomplete.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception as error:
            request_id = scope["state"]["request_id"]
            log.exception("request %s failed: %s %r", request_id, scope["method"], scope["path"][:200])
            if not begun:
                await error_response(error)(scope, receive, send)
