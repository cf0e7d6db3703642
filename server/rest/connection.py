"""One HTTP/1.1 connection: uvicorn's h11 protocol, with a timer on whatever its client is waited for."""

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Any, Literal

import h11
from pydantic_core import to_json
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from server.errors import ServiceError
from server.rest.headers import REQUEST_ID, new_request_id

if TYPE_CHECKING:
    from server.rest.listener import HttpListener

KEEP_ALIVE = 75.0  # seconds between two requests; longer than the usual load balancer keeps a connection
LINGER = 5.0  # seconds for a client to finish sending a body that was refused, so that it reads the answer

# What is waited for: the (rest of the) headers, the next request, a route, the end of a body nobody reads, the close.
Phase = Literal["headers", "idle", "route", "refused body", "close"]


class Connection(H11Protocol):
    """Made by `HttpListener` for each connection."""

    def __init__(self, listener: "HttpListener", config: Config, loop: asyncio.AbstractEventLoop):
        super().__init__(config, listener.state, {}, loop)
        self.logger = listener.log
        self._listener = listener
        settings = listener.settings
        self._seconds: dict[Phase, float] = {
            "headers": settings.header_timeout,
            "idle": KEEP_ALIVE,
            "refused body": LINGER,
            "close": LINGER,
        }
        self._slow_reader_timeout = settings.slow_reader_timeout
        self._phase: Phase | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(_Lingering(transport, self))  # type: ignore[arg-type]
        if self._listener.admit(self):
            self._watch()
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._enter(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():  # what comes after our last word is dropped
            super().data_received(data)
            self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._slow_reader_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def shutdown(self) -> None:
        with contextlib.suppress(h11.LocalProtocolError):
            super().shutdown()
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        self._watch()

    def make_room(self) -> None:
        """Closes a connection that idles, for the sake of a new one. From now on it is not counted."""
        self.connections.discard(self)
        self.transport.close()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles what h11 raised."""
        error = sys.exception()
        too_long = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        if too_long:
            self._refuse(431, ServiceError("invalid_value", "the request line and headers are too long"))
        else:
            self._refuse(400, ServiceError("invalid_value", f"this is not HTTP/1.1: {str(error)[:200]}"))

    def _refuse(self, status: int, error: ServiceError) -> None:
        """Answers what never became a request, and closes."""
        body = to_json(error.body())
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (REQUEST_ID.encode(), new_request_id().encode()),
            (b"connection", b"close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):  # a response to an earlier request is under way
            response = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._watch()

    def _watch(self) -> None:
        """Called after everything that can change what is waited for."""
        self._enter(self._current_phase())

    def _current_phase(self) -> Phase:
        if self.transport.is_closing():
            return "close"
        if self.cycle is not None and not self.cycle.response_complete:
            return "route"
        if self.conn.their_state is h11.SEND_BODY:
            return "refused body"
        return "headers" if self.cycle is None or self.conn.trailing_data[0] else "idle"

    def _enter(self, phase: Phase | None) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._listener.idle.pop(self, None)
        if phase in ("headers", "idle"):
            self._listener.idle[self] = None
        if phase is not None and phase in self._seconds:
            self._timer = self.loop.call_later(self._seconds[phase], self._late)

    def _late(self) -> None:
        if self._phase in ("close", "refused body"):
            self.transport.abort()
        elif self._phase == "headers" and self.conn.trailing_data[0]:
            seconds = self._seconds["headers"]
            self._refuse(408, ServiceError("request_timeout", f"the headers did not arrive within {seconds:g} s"))
        else:
            self.transport.close()
            self._watch()


class _Lingering:
    """A transport whose `close` only ends writing while the client still sends a body.

    The kernel would answer the rest of it with a reset, and the client lose the response it has not read yet.
    """

    def __init__(self, transport: Any, connection: Connection):
        self._transport = transport
        self._connection = connection
        self._closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        sends_body = self._connection.conn.their_state is h11.SEND_BODY
        linger = sends_body and not self.is_closing() and self._transport.can_write_eof()
        self._closing = True
        if linger:
            self._transport.write_eof()
            self._connection.flow.resume_reading()
        else:
            self._transport.close()
