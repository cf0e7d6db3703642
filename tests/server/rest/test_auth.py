"""Keys: what is open without one, and that nothing else is, however it is asked for."""

import hmac
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.rest import auth
from server.rest.auth import ApiKeys

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def guarded(start_live: Callable[..., Any]) -> Any:
    return start_live(api_key=KEYS)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def is_refused(answer: httpx.Response) -> bool:
    if answer.status_code != 401:
        return False
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    return True


@pytest.mark.parametrize("path", ["/", "/version", "/health", "/health/live", "/health/ready", "/ping"])
def test_health_version_and_the_page_need_no_key(guarded: Any, path: str) -> None:
    assert httpx.get(guarded.rest + path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/x"),
        ("GET", "/v1/engine/status"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/openapi.json"),
        ("GET", "/metrics"),
        ("GET", "/admin/status"),
        ("GET", "/nowhere"),
        ("POST", "/health"),
        ("OPTIONS", "/v1/models"),
        ("DELETE", "/"),
        ("GET", "//health"),
        ("GET", "/health/"),
        ("GET", "/health/../v1/models"),
        ("GET", "/health%2f..%2fv1%2fmodels"),
        ("GET", "/Health"),
        ("GET", "/version;/v1/models"),
    ],
)
def test_everything_else_needs_one(guarded: Any, method: str, path: str) -> None:
    assert is_refused(httpx.request(method, guarded.rest + path))
    assert is_refused(httpx.request(method, guarded.rest + path, headers=bearer("third-key")))
    assert not is_refused(httpx.request(method, guarded.rest + path, headers=bearer(KEYS[1])))


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", KEYS[0], f"Basic {KEYS[0]}", f"Bearer {KEYS[0]}x", f"Bearer {KEYS[0][:-1]}", "Bearer é"],
)
def test_a_wrong_key_is_refused_whatever_is_wrong_with_it(guarded: Any, value: str) -> None:
    assert is_refused(httpx.get(guarded.rest + "/v1/models", headers={"Authorization": value.encode("latin-1")}))


@pytest.mark.parametrize("value", [f"Bearer {KEYS[0]}", f"bearer {KEYS[1]}", f"BEARER   {KEYS[0]}"])
def test_any_of_the_keys_is_accepted(guarded: Any, value: str) -> None:
    assert httpx.get(guarded.rest + "/v1/models", headers={"Authorization": value}).status_code == 200


def test_two_keys_at_once_are_refused(guarded: Any) -> None:
    headers = [("Authorization", f"Bearer {KEYS[0]}"), ("Authorization", "Bearer other")]
    assert is_refused(httpx.get(guarded.rest + "/v1/models", headers=headers))


@pytest.mark.parametrize(
    "request_line",
    [
        b"GET http://127.0.0.1/health HTTP/1.1",  # a target with a host of its own
        b"GET /v1/models?/health HTTP/1.1",
        b"GET /v1/models#/health HTTP/1.1",
        b"GET \\health HTTP/1.1",
        b"GET * HTTP/1.1",
    ],
)
@pytest.mark.parametrize("host", [b"/health", b"x/health", b"127.0.0.1/health?", b"[", b"\xff"])
def test_no_host_and_no_target_talks_its_way_in(guarded: Any, request_line: bytes, host: bytes) -> None:
    address, port = guarded.rest.removeprefix("http://").split(":")
    with socket.create_connection((address, int(port)), 30) as sock:
        sock.sendall(request_line + b"\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
        status = sock.makefile("rb").readline()
    assert status.split()[1] in (b"400", b"401")


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare(sent: bytes, key: bytes) -> bool:
        compared.append(key)
        return real(sent, key)

    real = hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    guard = ApiKeys(None, KEYS)  # type: ignore[arg-type]
    assert guard._refusal([(b"authorization", b"Bearer first-key")]) is None
    assert compared == [key.encode() for key in KEYS]


def test_without_keys_everything_is_open(live: Any) -> None:
    assert httpx.get(live.rest + "/v1/models").status_code == 200
    assert httpx.get(live.rest + "/v1/models", headers=bearer("any")).status_code == 200
