"""Server-sent events: an async generator of events in, an HTTP response out that ends when the client does.

Nothing is sent until the first event or the first keep-alive is due, so what fails before gets its own HTTP status. A
client that does not read stops the generator, and is dropped by the connection, which has a deadline for it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from server.errors import service_error

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class EventStream(StreamingResponse):
    """Sends `source`, which is closed however it goes: at its end, its error, the client's disconnect.

    keep_alive: seconds of silence after which a comment is sent.

    An error of `source` before the first byte is raised, for the application's handlers; a later one becomes an event
    {"error": ...}, as OpenAI's clients expect it, and [DONE].
    """

    def __init__(
        self, source: AsyncGenerator[bytes, None], *, keep_alive: float, headers: Mapping[str, str] | None = None
    ):
        super().__init__(source, headers={**HEADERS, **(headers or {})}, media_type="text/event-stream")
        self._source = source
        self._keep_alive = keep_alive
        self._writing = asyncio.Lock()
        self._last_write = time.monotonic()
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [
            asyncio.ensure_future(self._pump(scope, send)),
            asyncio.ensure_future(self._keep_awake(send)),
            asyncio.ensure_future(disconnected(receive)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def _pump(self, scope: Scope, send: Send) -> None:
        try:
            async with aclosing(self._source) as source:
                async for events in source:
                    await self._write(send, events)
        except Exception as error:
            if not self._started:
                raise
            told = service_error(error)
            if told.code == "internal_error":
                log.exception("request %s failed in its stream", scope.get("state", {}).get("request_id"))
            await self._write(send, b"data: " + to_json(told.body()) + b"\n\n" + DONE)
        await self._write(send, b"", more=False)

    async def _keep_awake(self, send: Send) -> None:
        """Proxies close connections on which nothing moves."""
        while True:
            silent_for = time.monotonic() - self._last_write
            if silent_for < self._keep_alive:
                await asyncio.sleep(self._keep_alive - silent_for)
            else:
                await self._write(send, KEEP_ALIVE)

    async def _write(self, send: Send, data: bytes, more: bool = True) -> None:
        async with self._writing:
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": more})
            self._last_write = time.monotonic()


async def disconnected(receive: Receive) -> None:
    """Returns when the client is gone. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
