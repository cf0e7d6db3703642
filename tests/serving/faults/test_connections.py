"""What can be wrong with a request round its body: headers, keys, ids, and the connection itself."""

import base64
import itertools
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest

from jaxserve.v1 import inference_pb2 as pb

pytestmark = pytest.mark.serving

GET = b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n"
HEADER_TIMEOUT = 10.0  # seconds, the default


@pytest.mark.usefixtures("golden")
def test_headers_without_end_are_refused_and_the_connection_closed(server: Any, wire: Any) -> None:
    """6: a header of 20 MB, 100,000 headers."""
    for parts in (
        itertools.chain([GET + b"X-Long: "], itertools.repeat(b"x" * 65536, 320), [b"\r\n\r\n"]),
        itertools.chain([GET], (f"X-{i}: 1\r\n".encode() for i in range(100_000)), [b"\r\n"]),
    ):
        answer = wire.exchange(server.port, parts)
        assert answer.status in (None, 400, 431), answer.status
        if answer.status is not None:
            assert answer.headers["connection"] == "close" and answer.error["code"]


@pytest.mark.usefixtures("golden")
def test_headers_that_never_end_are_closed_in_time(server: Any, wire: Any) -> None:
    """6: one byte now and then does not keep a connection open; neither does silence. One that was used may idle."""
    with ExitStack() as stack:
        slow, silent, used = (
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30)) for _ in range(3)
        )
        used.sendall(GET + b"\r\n")
        assert wire.read_answer(used).status == 200
        slow.sendall(GET)
        begun = time.monotonic()
        while time.monotonic() < begun + HEADER_TIMEOUT + 5:
            with suppress(ConnectionError):
                slow.sendall(b"X")
            slow.settimeout(0.5)
            with suppress(TimeoutError):
                assert slow.recv(65536)[:12] in (b"", b"HTTP/1.1 408")
                break
        else:
            raise AssertionError("it is still open")
        assert silent.recv(1) == b""
        used.sendall(GET + b"\r\n")
        assert wire.read_answer(used).status == 200


def test_without_the_key_nothing_is_told(keyed: Any, wire_to: Callable[[Any], Any], golden_beside: Any) -> None:
    """7: a missing or wrong key, on any path, with any Host."""
    paths = ["/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/engine/status", "/openapi.json"]
    paths += [
        "/nothing",
        "//",
        "/v1/../health",
        "/health/../v1/models",
        "/v1/%6dodels",
        "/v1/models?/health",
        "/HEALTH",
    ]
    basic = base64.b64encode(keyed.key.encode()).decode()
    headers = ["", "Authorization: Bearer wrong", f"Authorization: Basic {basic}", f"Authorization: {keyed.key}"]
    headers += [f"Authorization: Bearer {keyed.key}x", f"Authorization: Bearer {keyed.key}\r\nAuthorization: Bearer x"]
    hosts = ["127.0.0.1", "evil.example", "127.0.0.1/health?", "x/health", ""]
    with golden_beside(keyed):
        for path, header in itertools.product(paths, headers):
            wanted = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{header}".rstrip() + "\r\nConnection: close\r\n\r\n"
            answer = wire_to(keyed).exchange(keyed.port, wanted.encode())
            assert answer.status == 401, (path, header, answer)
            assert answer.error["code"] == "invalid_api_key" and keyed.key not in answer.body.decode()
        for host in hosts:
            wanted = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
            assert wire_to(keyed).exchange(keyed.port, wanted.encode()).status in (400, 401), host
        for method in ("POST", "PUT", "OPTIONS", "DELETE", "NONSENSE"):
            wanted = f"{method} /health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            assert wire_to(keyed).exchange(keyed.port, wanted.encode()).status == 401, method
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            told = wire_to(keyed).refused_grpc(
                "invalid_api_key", None, "UNAUTHENTICATED", text="Hello", metadata=metadata
            )
            assert keyed.key not in told
        assert httpx.get(f"{keyed.rest}/health/ready").status_code == 200


def test_unknown_parameters_can_be_let_through(keyed: Any, golden_beside: Any) -> None:
    """9: with --unknown-params=warn they are ignored, and named in the log."""
    begin = keyed.log_size()
    with golden_beside(keyed):
        answer = keyed.post("/v1/completions", {"prompt": "Hello", "max_tokens": 1, "temprature": 1, "best": {"a": 1}})
        assert answer.status_code == 200, answer.text
    [warning] = [record for record in keyed.records(begin) if record["level"] == "warning"]
    assert "temprature" in warning["message"] and answer.headers["x-request-id"] in warning["message"]


@pytest.mark.usefixtures("golden")
def test_request_ids_that_cannot_stand_in_a_log_are_replaced(server: Any, wire: Any) -> None:
    """26: sent twice, of 10 kB, with what is no letter; a good one comes back."""
    body = b'{"prompt": "Hello", "max_tokens": 1}'
    assert wire.raw(body, "X-Request-Id: good-1.A_b:c").headers["x-request-id"] == "good-1.A_b:c"
    for headers in (
        ["X-Request-Id: one", "X-Request-Id: two"],
        ["X-Request-Id: " + "x" * 10_000],
        ["X-Request-Id: a b"],
        ["X-Request-Id: a\tb"],
        ["X-Request-Id: \x1b[31mred"],
        ["X-Request-Id: "],
        ["X-Request-Id: a\n Set-Cookie: b"],
    ):
        answer = wire.raw(body, *headers)
        if answer.status == 400:  # what is no HTTP at all
            continue
        assert answer.status == 200 and answer.headers["x-request-id"].isalnum(), headers
        assert len(answer.headers["x-request-id"]) == 32 and "set-cookie" not in answer.headers


@pytest.mark.usefixtures("golden")
def test_nothing_a_client_names_breaks_a_line_of_the_log(server: Any, wire: Any) -> None:
    """27: newlines, escapes and JSON in a model's name, a path, a method, an unknown parameter."""
    begin = server.log_size()
    poison = 'x\r\n{"level": "error", "message": "forged"}\u2028\x1b[2J'
    assert server.post("/v1/completions", {"model": poison, "prompt": "Hello"}).status_code == 404
    assert server.post("/v1/completions", {poison: 1, "prompt": "Hello"}).status_code == 400
    wire.refused_grpc("model_not_found", "model", "NOT_FOUND", model=poison, text="Hello")
    wire.exchange(server.port, b"GET /x%0a{} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    wire.exchange(server.port, b"FORGED\x1b /x HTTP/1.1\r\nHost: x\r\n\r\n")
    assert server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 1}).status_code == 200
    server.until(lambda: any("request_id" in r for r in server.records(begin)), "the last request is logged")
    text = server.log.read_bytes()[begin:].decode()
    for line in text.splitlines():
        record = json.loads(line)
        assert set(record) >= {"time", "level", "process", "logger", "message"}
        assert record["message"] != "forged"
    assert "\x1b" not in text and "\u2028" not in text


@pytest.mark.usefixtures("golden")
def test_the_public_port_has_no_metrics_and_no_controls(server: Any, keyed: Any) -> None:
    """28: what belongs to the admin port is not found, and not told where a key is needed."""
    for path in ("/metrics", "/admin/status", "/admin/drain", "/admin/abort", "/admin/reset_prefix_cache"):
        for method in ("GET", "POST"):
            assert httpx.request(method, server.rest + path).status_code == 404, path
            assert httpx.request(method, keyed.rest + path).status_code == 401, path
    # The admin port's controls need the key, too, and no web page can reach them through a browser.
    assert httpx.post(f"{keyed.admin}/admin/drain").status_code == 401
    for header in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        assert httpx.post(f"{server.admin}/admin/drain", headers=header).status_code == 403
    assert server.health().status_code == keyed.health().status_code == 200


def test_a_client_that_does_not_read_is_dropped(keyed: Any, wire_to: Callable[[Any], Any], golden_beside: Any) -> None:
    """33: what it does not read is not kept for it without bound, and its pages are freed."""
    # More than socket buffers hold: the prompt and its logprobs once for each sample, then each token with its own.
    body = {"prompt": [100] * 800, "echo": True, "logprobs": 20, "n": 8, "ignore_eos": True, "max_tokens": 220}
    body["stream"] = True
    wire = wire_to(keyed)
    with golden_beside(keyed), socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", keyed.port))
        sock.sendall(wire.request(json.dumps(body).encode(), f"Authorization: Bearer {keyed.key}"))
        keyed.until(lambda: keyed.metric("num_requests_running") >= 7, "its samples run")
        keyed.until(lambda: keyed.metric("num_requests_running") <= 1, "only the golden stream is left", 120)
        assert keyed.metric("errors_total", code="cancelled") >= 1
        with suppress(ConnectionError):
            while sock.recv(1 << 20):
                pass
    keyed.assert_idle()


@pytest.mark.usefixtures("golden")
def test_ten_thousand_connections_leave_health_and_streams_alone(server: Any) -> None:
    """38: beyond the limit new ones make the idlest go; whoever asks for health is answered."""
    with ExitStack() as stack:
        for number in range(10_000):
            sock = stack.enter_context(socket.socket())
            sock.settimeout(10)
            with suppress(ConnectionError, TimeoutError):
                sock.connect(("127.0.0.1", server.port))
            if number % 2000 == 1999:
                assert server.health().status_code == 200
                assert server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 1}).status_code == 200
    assert server.health().status_code == 200


@pytest.mark.usefixtures("golden")
def test_a_rapid_reset_leaves_health_and_streams_alone(server: Any, wire: Any) -> None:
    """38: HTTP/2 calls that are reset as soon as they are made, 20,000 of them on one connection."""
    with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=30) as sock, suppress(ConnectionError):
        sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, b""))
        for call in resets(20_000):
            sock.sendall(call)
    assert server.health().status_code == 200
    assert wire.stub.ListModels(pb.ListModelsRequest(), timeout=30).models
    server.until(lambda: server.metric("num_requests_running") <= 1, "only the golden stream runs")


SETTINGS, HEADERS, RST_STREAM = 4, 1, 3
END_HEADERS, CANCEL = 4, 8


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: str, value: str) -> bytes:
    """A header field in HPACK, neither indexed nor compressed."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def resets(count: int) -> Iterator[bytes]:
    fields = {":method": "POST", ":scheme": "http", ":path": "/jaxserve.v1.Inference/GenerateStream"}
    fields |= {":authority": "127.0.0.1", "content-type": "application/grpc", "te": "trailers"}
    block = b"".join(literal(name, value) for name, value in fields.items())
    for stream in range(1, 2 * count, 2):
        yield frame(HEADERS, END_HEADERS, stream, block) + frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))
