"""Around every call of jaxserve.v1.Inference: its id, a bound on how many run, slow readers, and errors as statuses.

The methods inside take (message, Call) and return or yield messages; they know no gRPC and may raise anything.
"""

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from jaxserve.v1 import inference_pb2 as pb
from server.errors import ServiceError
from server.rpc.convert import Call
from server.rpc.errors import abort

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
PREFIX = f"/{SERVICE}/"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Calls(grpc.aio.ServerInterceptor):
    """max_calls: that may run at once. slow_reader_timeout: seconds one message of a stream may wait for its reader."""

    def __init__(self, max_calls: int, slow_reader_timeout: float):
        self._max_calls = max_calls
        self._slow_reader_timeout = slow_reader_timeout
        self._running = 0
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method in self._handlers:
            return self._handlers[details.method]
        handler = await continuation(details)
        if handler is None or not details.method.startswith(PREFIX):
            return handler
        self._handlers[details.method] = self._around(handler, "Inference/" + details.method.removeprefix(PREFIX))
        return self._handlers[details.method]

    def _around(self, handler: grpc.RpcMethodHandler, endpoint: str) -> grpc.RpcMethodHandler:
        def decoded(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except Exception as error:  # protobuf names no type for it
                return ServiceError("invalid_value", f"the message of {endpoint} is malformed: {error}")

        async def unary(message: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._call(message, context, endpoint) as call:
                answer = await handler.unary_unary(message, call)
                await context.send_initial_metadata(_sent_back(call))
                return answer

        async def stream(message: Any, context: grpc.aio.ServicerContext) -> None:
            async with (
                self._call(message, context, endpoint) as call,
                contextlib.aclosing(handler.unary_stream(message, call)) as answers,
            ):
                started = False
                async for answer in answers:
                    await self._write(context, answer, None if started else call)
                    started = True

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, decoded, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(unary, decoded, handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _call(self, message: Any, context: grpc.aio.ServicerContext, endpoint: str) -> AsyncIterator[Call]:
        """Counts the call, and ends it with the status of whatever is raised inside."""
        call = Call(
            endpoint=endpoint,
            request_id=request_id(context),
            timeout=context.time_remaining(),
            traceparent=_metadata(context, "traceparent"),
        )
        self._running += 1
        try:
            if self._running > self._max_calls:
                raise ServiceError("queue_full", f"{self._max_calls} calls are running already", retry_after=1.0)
            if isinstance(message, ServiceError):
                raise message
            yield call
        except Exception as error:
            # Metadata sent before would make gRPC's retry policy take the error for the answer, so it goes along here.
            await abort(context, error, call.request_id)
        finally:
            self._running -= 1

    async def _write(self, context: grpc.aio.ServicerContext, answer: Any, first_of: Call | None) -> None:
        try:
            async with asyncio.timeout(self._slow_reader_timeout):
                if first_of is not None:
                    await context.send_initial_metadata(_sent_back(first_of))
                await context.write(answer)
        except TimeoutError:
            raise ServiceError(
                "cancelled", f"the client read nothing for {self._slow_reader_timeout:g} s, so its stream was ended"
            ) from None


def request_id(context: grpc.aio.ServicerContext) -> str:
    """The client's x-request-id if it can be used as it is, else a new one."""
    sent = _metadata(context, "x-request-id")
    return sent if sent is not None and REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


def _metadata(context: grpc.aio.ServicerContext, name: str) -> str | None:
    """A header that was sent exactly once, as text."""
    values = [value for key, value in context.invocation_metadata() if key == name]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else None


def _sent_back(call: Call) -> tuple[tuple[str, str], ...]:
    return (("x-request-id", call.request_id),)
