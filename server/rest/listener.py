"""A socket and an ASGI app -> an HTTP/1.1 server on the running loop that no client can hold up.

Every wait for a client has a deadline: for its headers, for the rest of a body nobody reads, for it to read what was
sent, and between two requests. The connections of one listener are counted; beyond the limit the one that idles longest
makes room, and where all are busy, new ones are told to come back, all but those that ask for health.

The protocol is uvicorn's, on h11, which bounds headers. Signals are the process's business: nothing here touches them.
"""

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
import time
from email.utils import formatdate
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from jaxserve.errors import ConfigError
from server.errors import ServiceError
from server.rest.auth import HEALTH_PATHS
from server.rest.connection import KEEP_ALIVE, Connection
from server.rest.errors import error_response
from server.rest.headers import REQUEST_ID, sanitised_request_id
from server.settings import ServerSettings

log = logging.getLogger("server.rest.http")
log.addFilter(lambda record: record.levelno != logging.WARNING)  # uvicorn warns of what any client can do at will

MAX_HEADER_BYTES = 64 << 10  # request line and headers
RESERVED = 32  # connections over max_connections that may still ask for health
SPARE_FILES = 256  # open files a process needs beside its connections
# Two lengths for one body: whoever stands in front may see another request in it than we do (RFC 9112, 6.3).
LENGTHS = frozenset({b"content-length", b"transfer-encoding"})
CANCEL_GRACE = 1.0  # seconds for routes to notice that their client is gone


def bind(host: str, port: int, reuse_port: bool = True) -> socket.socket:
    """A TCP socket, bound and not yet listening. Port 0 takes any free one. Raises ConfigError naming host and port.

    reuse_port: other processes may bind the same port and share its connections. "::" takes IPv4, too.
    """
    sock: socket.socket | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # "localhost" may be both, and what people then try is 127.0.0.1.
        family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        sock.bind(address)
        sock.setblocking(False)
    except (OSError, UnicodeError) as error:
        if sock is not None:
            sock.close()
        raise ConfigError(f"host={host!r} port={port} cannot be listened on: {error}") from None
    return sock


class HttpListener:
    """`start` and `stop` once each, on one loop. tls: use settings.ssl_* where they are set."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, sock: socket.socket, *, tls: bool = True):
        self.settings = settings
        self.idle: dict[Connection, None] = {}  # wait for a request, the one that waits longest first
        self.state = ServerState()
        self.log = log
        self._app = app
        self._sock = sock
        self._stopping = False
        self._server: asyncio.Server | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._config = uvicorn.Config(
            self._call,
            http=H11Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(KEEP_ALIVE),  # its own default hangs up long before ours
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            **_tls_options(settings) if tls else {},
        )

    @property
    def port(self) -> int:
        return self._sock.getsockname()[1]

    async def start(self) -> None:
        """Listens. Raises ConfigError if the certificates cannot be used."""
        try:
            self._config.load()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"ssl_certfile={self.settings.ssl_certfile!r} cannot be used: {error}") from None
        allow_open_files(self.settings.max_connections + SPARE_FILES)
        loop = asyncio.get_running_loop()
        self._tell_time()
        tls = self._config.ssl
        self._server = await loop.create_server(
            lambda: Connection(self, self._config, loop),
            sock=self._sock,
            backlog=self._config.backlog,
            ssl=tls,
            ssl_handshake_timeout=self.settings.header_timeout if tls else None,
        )

    async def stop(self, grace: float) -> None:
        """Accepts nothing more, and returns when all that runs is answered, or cut off after `grace` seconds."""
        self._stopping = True
        if self._server is not None:
            self._server.close()
        if self._clock is not None:
            self._clock.cancel()
        deadline = time.monotonic() + grace
        connections = self.state.connections
        for connection in [*connections]:
            connection.shutdown()
        while connections and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for connection in [*connections]:
            connection.transport.abort()
        await asyncio.sleep(0)  # in which they are told
        if self.state.tasks:
            _, late = await asyncio.wait([*self.state.tasks], timeout=CANCEL_GRACE)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def admit(self, connection: Connection) -> bool:
        """False: there is no room even to refuse politely. A connection over the limit gets an app that says so."""
        open_now, limit = len(self.state.connections), self.settings.max_connections
        if open_now > limit and self.idle:
            next(iter(self.idle)).make_room()
            open_now -= 1
        if open_now > limit:
            connection.app = self._call_overloaded
        return open_now <= limit + RESERVED

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if LENGTHS.issubset(name for name, _ in scope["headers"]):
                error = ServiceError("invalid_value", "a request has Content-Length or Transfer-Encoding, not both")
                await _refuse(error, scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._stopping:  # else it is `stop` that cancelled, and uvicorn would log a traceback
                raise

    async def _call_overloaded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in HEALTH_PATHS:
            return await self._call(scope, receive, send)
        limit = self.settings.max_connections
        error = ServiceError("queue_full", f"all of max_connections={limit} connections are in use", retry_after=1)
        await _refuse(error, scope, receive, send)

    def _tell_time(self) -> None:
        self.state.default_headers = [(b"date", formatdate(usegmt=True).encode())]
        self._clock = asyncio.get_running_loop().call_later(1.0, self._tell_time)


async def serve_http(app: ASGIApp, settings: ServerSettings, sock: socket.socket, *, tls: bool = True) -> HttpListener:
    """A listener that serves `app` on `sock` until its `stop`."""
    listener = HttpListener(app, settings, sock, tls=tls)
    await listener.start()
    return listener


def allow_open_files(wanted: int) -> None:
    """Raises this process's soft limit on open files as far as it may, and logs where that is too little."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, raised), hard))
        if raised < wanted:
            log.error("max_connections needs %d open files, this process may have %d: see ulimit -n", wanted, raised)


async def _refuse(error: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers instead of the application, and closes."""
    headers = {"Connection": "close", REQUEST_ID: sanitised_request_id(scope["headers"])}
    await error_response(error, headers)(scope, receive, send)


def _tls_options(settings: ServerSettings) -> dict[str, Any]:
    if settings.ssl_certfile is None:
        return {}
    return {
        "ssl_certfile": settings.ssl_certfile,
        "ssl_keyfile": settings.ssl_keyfile,
        "ssl_ca_certs": settings.ssl_ca_certs,
        "ssl_cert_reqs": ssl.CERT_NONE if settings.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    }
