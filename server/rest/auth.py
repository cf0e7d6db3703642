"""API keys: every path but a few open ones needs `Authorization: Bearer KEY`. Middleware that runs before any routing.

The decision falls on the path as it was sent, never on the Host header or on anything rebuilt from it, and what is not
known to be open is closed, routes that do not exist included.
"""

import hmac
from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ServiceError
from server.rest.errors import error_response

HEALTH_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping"})
OPEN_PATHS = HEALTH_PATHS | {"/", "/version"}


class ApiKeys:
    """keys: any of them is accepted; none = no key is needed. open_paths: what can be read without one."""

    def __init__(self, app: ASGIApp, keys: Collection[str], open_paths: Collection[str] = OPEN_PATHS):
        self.app = app
        self._keys = [key.encode() for key in keys]
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._keys or (scope["method"] in ("GET", "HEAD") and scope["path"] in self._open_paths):
            return await self.app(scope, receive, send)
        if (error := self._refusal(scope["headers"])) is not None:
            return await error_response(error)(scope, receive, send)
        await self.app(scope, receive, send)

    def _refusal(self, headers: list[tuple[bytes, bytes]]) -> ServiceError | None:
        sent = [value for name, value in headers if name == b"authorization"]
        if len(sent) != 1:
            how_many = f"{len(sent)} Authorization headers" if sent else "no Authorization header"
            return ServiceError("invalid_api_key", f"{how_many}: send Authorization: Bearer KEY")
        scheme, _, key = sent[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return ServiceError("invalid_api_key", "the Authorization header must be: Bearer KEY")
        key = key.strip()
        # All keys are compared, so that the time taken does not tell which one was near.
        equal = [hmac.compare_digest(key, known) for known in self._keys]
        return None if any(equal) else ServiceError("invalid_api_key", "this API key is not one of the server's")
