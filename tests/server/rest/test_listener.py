"""The HTTP server under the routes, with applications of a few lines: what clients do to it, and what it answers."""

import asyncio
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop
from starlette.types import Receive, Scope, Send

from jaxserve.errors import ConfigError
from server.rest import connection, listener
from server.rest.listener import HttpListener, bind, serve_http
from server.settings import ServerSettings

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CLIENTS: list["Client"] = []  # of this test
Test = Callable[[HttpListener], Awaitable[None]]


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the path, without reading a body."""
    body = scope["path"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def serving(request: pytest.FixtureRequest) -> Callable[..., None]:
    """serving(test, app, **settings): runs `test(listener)` beside a listener on a free port."""

    def run(test: Test, app: Any = hello, **settings: Any) -> None:
        async def main() -> None:
            server = await serve_http(app, ServerSettings(**settings), bind("127.0.0.1", 0))
            try:
                await asyncio.wait_for(test(server), 20)
            finally:
                await server.stop(0.0)
                while CLIENTS:
                    await CLIENTS.pop().end()
            assert not server.state.connections
            assert not server.state.tasks and not server.idle

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main())

    return run


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one response that says how long it is."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return int(status.split()[1]), headers, body

    async def end(self) -> None:
        self.writer.transport.abort()
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    async def closed(self) -> bool:
        """Waits for the server to end the connection; True if it sent nothing before that."""
        try:
            return await self.reader.read() == b""
        except ConnectionResetError:
            return True


async def connect(server: HttpListener, **options: Any) -> Client:
    client = Client(*await asyncio.open_connection("127.0.0.1", server.port, **options))
    CLIENTS.append(client)
    return client


def test_requests_on_one_connection_are_answered_in_order(serving: Callable[..., None]) -> None:
    async def test(server: HttpListener) -> None:
        client = await connect(server)
        for path in ("/a", "/b"):
            client.send(GET.replace(b"/ ", path.encode() + b" "))
            assert (await client.answer())[2] == path.encode()
        client.send(GET * 3)  # pipelined
        assert [(await client.answer())[0] for _ in range(3)] == [200] * 3

    serving(test)


def test_no_header_tells_what_the_server_runs_on(serving: Callable[..., None]) -> None:
    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.send(GET)
        _, headers, _ = await client.answer()
        assert set(headers) == {"date", "content-length"}

    serving(test)


@pytest.mark.parametrize("received", [b"G", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: b"])
def test_headers_that_do_not_come_to_an_end_get_408_and_a_closed_connection(
    serving: Callable[..., None], received: bytes
) -> None:
    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.send(received)
        status, headers, body = await client.answer()
        assert status == 408
        assert json.loads(body)["error"]["code"] == "request_timeout"
        assert headers["connection"] == "close" and headers["x-request-id"]
        assert await client.closed()

    serving(test, header_timeout=0.2)


def test_dripping_headers_do_not_extend_the_deadline(serving: Callable[..., None]) -> None:
    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.send(b"GET / HTTP/1.1\r\n")
        answer = asyncio.ensure_future(client.answer())
        sent = 0
        while not answer.done():
            client.send(b"X-%d: y\r\n" % sent)
            sent += 1
            await asyncio.sleep(0.02)
        assert answer.result()[0] == 408
        assert sent > 3

    serving(test, header_timeout=0.3)


def test_a_connection_that_says_nothing_is_closed_without_an_answer(serving: Callable[..., None]) -> None:
    async def test(server: HttpListener) -> None:
        assert await (await connect(server)).closed()

    serving(test, header_timeout=0.2)


def test_a_second_request_has_the_deadline_of_the_first(serving: Callable[..., None]) -> None:
    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.send(GET + b"GET /half")  # the start of the next comes with the whole of the first
        assert (await client.answer())[0] == 200
        assert (await client.answer())[0] == 408

    serving(test, header_timeout=0.2)


def test_an_idle_connection_is_kept_for_longer_than_headers_may_take(
    serving: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "KEEP_ALIVE", 0.6)

    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.send(GET)
        await client.answer()
        await asyncio.sleep(0.3)
        client.send(GET)
        assert (await client.answer())[0] == 200
        assert await client.closed()

    serving(test, header_timeout=0.1)


def test_a_route_may_take_longer_than_headers_may(serving: Callable[..., None]) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.4)
        await hello(scope, receive, send)

    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.send(GET)
        assert (await client.answer())[0] == 200

    serving(test, slow, header_timeout=0.1)


@pytest.mark.parametrize(
    "headers",
    [b"X: " + b"a" * 20_000_000, b"".join(b"X-%d: y\r\n" % i for i in range(100_000))],
    ids=["20 MB header", "100,000 headers"],
)
def test_headers_beyond_measure_get_431_and_a_closed_connection(serving: Callable[..., None], headers: bytes) -> None:
    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n\r\n")
        try:
            status, _, body = await client.answer()
        except (ConnectionResetError, asyncio.IncompleteReadError):
            return  # closed while most of it was still on its way
        assert status == 431 and json.loads(body)["error"]["type"] == "invalid_request_error"
        assert await client.closed()

    serving(test)


def test_headers_just_beyond_measure_are_told_so(serving: Callable[..., None]) -> None:
    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * listener.MAX_HEADER_BYTES)
        status, headers, body = await client.answer()
        assert (status, headers["connection"]) == (431, "close")
        assert "too long" in json.loads(body)["error"]["message"]

    serving(test)


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["TLS", "no path", "no Host"],
)
def test_what_is_not_http_gets_400_and_a_closed_connection(serving: Callable[..., None], junk: bytes) -> None:
    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.send(junk)
        status, headers, body = await client.answer()
        assert (status, headers["connection"]) == (400, "close")
        assert json.loads(body)["error"]["code"] == "invalid_value"
        assert await client.closed()

    serving(test)


@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"], ids=["keep-alive", "close"])
def test_a_client_that_sends_a_refused_body_still_reads_the_answer(serving: Callable[..., None], header: bytes) -> None:
    async def test(server: HttpListener) -> None:
        client = await connect(server)
        length = 8 << 20
        client.send(b"POST /refused HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n" % (header, length))
        client.send(b"x" * length)
        await client.writer.drain()  # all of it, before the answer is looked at
        assert (await client.answer())[2] == b"/refused"
        if not header:
            client.send(GET)
            assert (await client.answer())[2] == b"/"

    serving(test)


@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"], ids=["keep-alive", "close"])
def test_a_refused_body_that_does_not_end_is_cut_off(
    serving: Callable[..., None], header: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LINGER", 0.2)

    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.send(b"POST / HTTP/1.1\r\nHost: x\r\n%bTransfer-Encoding: chunked\r\n\r\n" % header)
        assert (await client.answer())[0] == 200
        with pytest.raises((ConnectionError, RuntimeError)):  # the latter from uvloop, for a transport that is closed
            while True:
                client.send(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                await client.writer.drain()
                await asyncio.sleep(0.01)

    serving(test)


def test_a_client_that_reads_nothing_is_dropped(serving: Callable[..., None]) -> None:
    ended = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.ensure_future(_disconnected(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
        ended.set()

    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(GET)
        await ended.wait()

    serving(test, endless, slow_reader_timeout=0.2)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def test_a_body_with_two_lengths_gets_400_and_a_closed_connection(serving: Callable[..., None]) -> None:
    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.send(
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET
        )
        status, headers, body = await client.answer()
        assert status == 400 and headers["connection"] == "close" and headers["x-request-id"]
        assert json.loads(body)["error"]["message"] == "a request has Content-Length or Transfer-Encoding, not both"
        assert await client.closed()

    serving(test)


def test_a_new_connection_over_the_limit_takes_the_place_of_the_one_idle_longest(serving: Callable[..., None]) -> None:
    async def test(server: HttpListener) -> None:
        silent = await connect(server)
        used = await connect(server)
        used.send(GET)
        await used.answer()
        await asyncio.sleep(0.05)
        new = await connect(server)
        assert await silent.closed()
        for client in (used, new):
            client.send(GET)
            assert (await client.answer())[0] == 200

    serving(test, max_connections=2)


def test_where_all_connections_are_busy_only_health_is_answered(
    serving: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "RESERVED", 2)
    release = asyncio.Event()

    async def busy(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/":
            await release.wait()
        await hello(scope, receive, send)

    async def test(server: HttpListener) -> None:
        first = await connect(server)
        first.send(GET)
        while not server.state.tasks:
            await asyncio.sleep(0.01)
        for _ in range(5):
            refused = await connect(server)
            refused.send(GET)
            status, headers, body = await refused.answer()
            assert (status, headers["retry-after"], headers["connection"]) == (429, "1", "close")
            assert json.loads(body)["error"]["code"] == "queue_full"
            assert await refused.closed()
        probe = await connect(server)
        probe.send(GET.replace(b"/ ", b"/health/ready "))
        assert (await probe.answer())[2] == b"/health/ready"
        release.set()
        assert (await first.answer())[0] == 200

    serving(test, busy, max_connections=1)


def test_a_flood_of_connections_leaves_the_server_answering(serving: Callable[..., None]) -> None:
    async def test(server: HttpListener) -> None:
        flood = [await connect(server) for _ in range(200)]
        assert len(server.state.connections) <= 10 + 1
        client = await connect(server)
        client.send(GET)
        assert (await client.answer())[0] == 200
        for other in flood:
            other.writer.close()

    serving(test, max_connections=10)


def test_stop_lets_running_responses_finish_and_closes_idle_connections(serving: Callable[..., None]) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            await asyncio.sleep(0.3)
        await hello(scope, receive, send)

    async def test(server: HttpListener) -> None:
        idle, running = await connect(server), await connect(server)
        idle.send(GET)
        await idle.answer()
        running.send(GET.replace(b"/ ", b"/slow "))
        while not server.state.tasks:
            await asyncio.sleep(0.01)
        stopped = asyncio.ensure_future(server.stop(10.0))
        assert await idle.closed()
        with pytest.raises(OSError):
            await connect(server)
        assert (await running.answer())[2] == b"/slow"
        assert await running.closed()
        await stopped

    serving(test, slow)


def test_stop_cuts_off_what_outlasts_its_grace_and_logs_no_traceback(
    serving: Callable[..., None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "CANCEL_GRACE", 0.1)
    cancelled = []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(scope["path"])

    async def test(server: HttpListener) -> None:
        client = await connect(server)
        client.send(GET)
        while not server.state.tasks:
            await asyncio.sleep(0.01)
        await server.stop(0.05)
        assert await client.closed()

    serving(test, endless)
    assert cancelled == ["/"]
    assert not caplog.records


def test_two_sockets_share_a_port_only_if_both_want_to() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        bind("127.0.0.1", port).close()
        with pytest.raises(ConfigError, match=f"port={port}"):
            bind("127.0.0.1", port, reuse_port=False)


def test_a_host_that_is_not_here_is_named() -> None:
    with pytest.raises(ConfigError, match="host='192.0.2.1' port=8000"):
        bind("192.0.2.1", 8000)


def test_localhost_means_127_0_0_1() -> None:
    with bind("localhost", 0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_the_ipv6_wildcard_takes_ipv4_too() -> None:
    try:
        sock = bind("::", 0)
    except ConfigError:
        pytest.skip("no IPv6 here")
    with sock:
        sock.listen()
        socket.create_connection(("127.0.0.1", sock.getsockname()[1])).close()


def test_a_certificate_that_cannot_be_used_is_a_config_error(tmp_path: Any) -> None:
    paths = {name: str(tmp_path / name) for name in ("ssl_certfile", "ssl_keyfile")}
    for path in paths.values():
        open(path, "w").close()

    async def main() -> None:
        with bind("127.0.0.1", 0) as sock, pytest.raises(ConfigError, match="ssl_certfile"):
            await serve_http(hello, ServerSettings(**paths), sock)

    asyncio.run(main())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of one self-signed certificate for localhost and of its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate with")
    directory = tmp_path_factory.mktemp("tls")
    paths = {name: str(directory / f"{name}.pem") for name in ("cert", "key")}
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", paths["key"], "-out", paths["cert"]]
    subprocess.run([openssl, *options.split(), *names], check=True, capture_output=True, timeout=60)
    return paths


def test_with_a_ca_clients_must_show_a_certificate(serving: Callable[..., None], certificates: dict[str, str]) -> None:
    """certificates: one self-signed certificate, which is the server's, the client's, and the authority."""
    cert, key = certificates["cert"], certificates["key"]

    async def test(server: HttpListener) -> None:
        trusting = ssl.create_default_context(cafile=cert)
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            client = await connect(server, ssl=trusting, server_hostname="localhost")
            client.send(GET)
            await client.answer()
        trusting.load_cert_chain(cert, key)
        client = await connect(server, ssl=trusting, server_hostname="localhost")
        client.send(GET)
        assert (await client.answer())[0] == 200
        client.writer.close()

    serving(test, ssl_certfile=cert, ssl_keyfile=key, ssl_ca_certs=cert)
