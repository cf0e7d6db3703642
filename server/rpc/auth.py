"""API keys in metadata: which calls pass. Decided on the method's raw path before its message is read."""

import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from server.errors import ServiceError
from server.rpc.calls import request_id
from server.rpc.errors import abort

# Asked by orchestrators, which hold no key; everything else, known or not, needs one.
OPEN_METHODS = frozenset(f"/grpc.health.v1.Health/{method}" for method in ("Check", "Watch", "List"))
SCHEME = b"bearer "


class ApiKeys(grpc.aio.ServerInterceptor):
    """keys: any of them is accepted; empty = no key is needed."""

    def __init__(self, keys: Sequence[str]):
        self._keys = [key.encode() for key in keys]

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        if not self._keys or details.method in OPEN_METHODS or self._accepts(details.invocation_metadata):
            return await continuation(details)
        return REFUSAL

    def _accepts(self, metadata: Sequence[tuple[str, str | bytes]]) -> bool:
        sent = [value for name, value in metadata if name == "authorization"]
        if len(sent) != 1:
            return False
        value = sent[0].encode() if isinstance(sent[0], str) else sent[0]
        if value[: len(SCHEME)].lower() != SCHEME:
            return False
        key = value[len(SCHEME) :].strip()
        # Every key is compared, so that the time taken does not tell which one was close.
        return any([hmac.compare_digest(key, known) for known in self._keys])


async def _refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
    message = 'the API key is missing or not known; send it as metadata "authorization: Bearer KEY"'
    await abort(context, ServiceError("invalid_api_key", message), request_id(context))


# A handler of streams answers at once, whatever the method; any other kind would wait for the message first.
REFUSAL = grpc.stream_stream_rpc_method_handler(_refuse)
