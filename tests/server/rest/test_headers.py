"""X-Request-Id on every response; the headers that say how a call is treated."""

import re
import socket
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from server.errors import ServiceError
from server.rest.call import call_options

OWN = re.compile(r"[0-9a-f]{32}")


@pytest.mark.parametrize("sent", ["a", "chatcmpl-1:2.3_4", "x" * 128])
def test_a_usable_request_id_comes_back(live: Any, sent: str) -> None:
    assert httpx.get(live.rest + "/version", headers={"X-Request-Id": sent}).headers["x-request-id"] == sent


@pytest.mark.parametrize(
    "sent", ["", "x" * 129, "x" * 10_000, "a b", "a\tb", "ä", 'a"b', "a,b", "<script>", "a/b", "%0a"]
)
def test_any_other_is_replaced(live: Any, sent: str) -> None:
    answer = httpx.get(live.rest + "/version", headers={"X-Request-Id": sent.encode()})
    assert OWN.fullmatch(answer.headers["x-request-id"])


def test_two_request_ids_are_replaced(live: Any) -> None:
    answer = httpx.get(live.rest + "/version", headers=[("X-Request-Id", "a"), ("X-Request-Id", "a")])
    assert OWN.fullmatch(answer.headers["x-request-id"])


@pytest.mark.parametrize("value", [b"a\nInjected: 1", b"a\r\n Injected: 1", b"a\x00b", b"a\rb"])
def test_a_request_id_cannot_write_headers(live: Any, value: bytes) -> None:
    host, port = live.rest.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: " + value + b"\r\n\r\n")
        head = sock.makefile("rb").read().partition(b"\r\n\r\n")[0].lower()
    assert b"\ninjected" not in head
    assert re.search(rb"x-request-id: [0-9a-f]{32}(\r\n|$)", head) or b"x-request-id: a\r\n" in head


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health/ready", 200),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/completions", 415),
        ("GET", "/openapi.json", 200),
    ],
)
def test_errors_carry_the_id_too(live: Any, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, live.rest + path, headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")


def test_every_response_has_an_id_of_its_own(live: Any) -> None:
    ids = {httpx.get(live.rest + "/version").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3 and all(OWN.fullmatch(one) for one in ids)


def request_with(*headers: tuple[str, str]) -> Request:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    state = {"request_id": "the-id"}
    return Request({"type": "http", "headers": raw, "state": state, "app": SimpleNamespace()})


def test_headers_become_options() -> None:
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    request = request_with(("X-Request-Timeout", "2.5"), ("X-Priority", "-3"), ("traceparent", trace))
    options = call_options(request, "/v1/completions", cache_salt="s", add_special_tokens=None)
    assert (options.endpoint, options.client_request_id, options.cache_salt) == ("/v1/completions", "the-id", "s")
    assert (options.timeout, options.priority, options.traceparent) == (2.5, -3, trace)
    assert options.add_special_tokens is None


def test_what_the_body_says_counts_more_than_a_header() -> None:
    assert call_options(request_with(("X-Priority", "5")), "x", priority=1).priority == 1
    assert call_options(request_with(("X-Priority", "5")), "x", priority=None).priority == 5
    assert call_options(request_with(), "x", priority=None).priority == 0


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e999", "soon", "", "1 s", "0x10", "9" * 50])
def test_a_timeout_that_is_no_positive_number_is_refused(value: str) -> None:
    with pytest.raises(ServiceError) as caught:
        call_options(request_with(("X-Request-Timeout", value)), "x")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "X-Request-Timeout")


@pytest.mark.parametrize("value", ["1.5", "high", "", "2147483648", "-2147483649", "9" * 5000, "٣"])
def test_a_priority_that_is_no_32_bit_integer_is_refused(value: str) -> None:
    request = request_with()
    request.scope["headers"].append((b"x-priority", value.encode()))
    with pytest.raises(ServiceError) as caught:
        call_options(request, "x")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "X-Priority")


def test_a_header_given_twice_is_refused() -> None:
    with pytest.raises(ServiceError, match="2 times"):
        call_options(request_with(("X-Request-Timeout", "1"), ("X-Request-Timeout", "2")), "x")


@pytest.mark.parametrize(
    "value",
    ["", "00", "00-" + "0" * 32 + "-" + "b" * 16 + "-01", "ff-" + "a" * 32 + "-" + "b" * 16 + "-01", "x" * 10_000],
)
def test_a_malformed_traceparent_is_left_out(value: str) -> None:
    assert call_options(request_with(("traceparent", value)), "x").traceparent is None


def test_a_timeout_reaches_the_scheduler(live: Any) -> None:
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}
    answer = httpx.post(live.rest + "/v1/completions", json=body, headers={"X-Request-Timeout": "0.000001"})
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"


def test_a_wrong_header_is_named(live: Any) -> None:
    answer = httpx.post(live.rest + "/v1/completions", json={"prompt": "a"}, headers={"X-Request-Timeout": "-1"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "X-Request-Timeout"
