"""grpc.health.v1 from the front end's own health: SERVING = ready. Open to callers without a key, so bounded."""

import asyncio
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthServicer

from server.frontend.health import HealthReport
from server.rpc.calls import SERVICE

SERVICES = ("", SERVICE)  # "" = the server as a whole
MAX_WATCHERS = 256
WATCH_INTERVAL = 0.5  # seconds between two looks

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(HealthServicer):
    """ready: asked at every check, on the event loop. draining: whether the server is about to end."""

    def __init__(self, ready: Callable[[], HealthReport], draining: Callable[[], bool]):
        self._ready = ready
        self._draining = draining
        self._watchers = 0

    async def Check(
        self, message: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Metadata "cause" of the answer says why it is not SERVING."""
        if message.service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service={message.service[:200]!r} is not known")
        report = self._ready()
        if report.cause is not None:
            context.set_trailing_metadata((("cause", report.cause.encode("ascii", "replace").decode()),))
        return health_pb2.HealthCheckResponse(status=_status(report))

    async def List(
        self, message: health_pb2.HealthListRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthListResponse:
        answer = health_pb2.HealthCheckResponse(status=_status(self._ready()))
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(SERVICES, answer))

    async def Watch(self, message: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        """The status now, and again whenever it changes; ends when the server drains, which it must not hold up."""
        if self._watchers >= MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} calls watch already")
        self._watchers += 1
        try:
            told: int | None = None
            while True:
                draining = self._draining()
                known = message.service in SERVICES
                status = _status(self._ready()) if known else SERVICE_UNKNOWN
                if status != told:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                    told = status
                if draining:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is draining")
                await asyncio.sleep(WATCH_INTERVAL)
        finally:
            self._watchers -= 1


def _status(report: HealthReport) -> int:
    return SERVING if report.ok else NOT_SERVING
