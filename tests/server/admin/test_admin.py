"""The admin port: metrics and control for who reaches it, and nothing for web pages that try to."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_metrics_come_in_the_format_the_scraper_accepts(live: Any, accept: str) -> None:
    answer = httpx.get(live.admin + "/metrics", headers={"Accept": accept} if accept else {})
    assert answer.status_code == 200
    wanted = "application/openmetrics-text" if accept else "text/plain"
    assert answer.headers["content-type"].startswith(wanted)
    assert "jaxserve:num_requests_running" in answer.text
    assert answer.text.endswith("# EOF\n") == bool(accept)


def test_status_shows_engine_memory_and_settings(live: Any) -> None:
    httpx.post(live.rest + "/v1/completions", json={"prompt": "a", "max_tokens": 1})  # ready: it made a token lately
    status = httpx.get(live.admin + "/admin/status").json()
    assert status["models"] == [live.model] and status["root"] == live.frontend.model_root
    assert status["engine"]["phase"] == "ready" and status["engine"]["stats"]["pages_total"] == 128
    assert status["info"]["limits"]["max_model_len"] == 256 and "memory_plan" in status["info"]
    assert status["settings"]["max_body_bytes"] == live.settings.max_body_bytes
    assert status["health"]["ok"] is True and status["draining"] is False


def test_abort_ends_a_request_by_the_id_its_response_carries(live: Any) -> None:
    body = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", live.rest + "/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
        request_id = httpx.Response(200, text=first.removeprefix("data: ")).json()["id"]
        answer = httpx.post(live.admin + "/admin/abort", json={"request_id": request_id})
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        rest = "".join(lines)
    assert "[DONE]" in rest
    live.assert_idle()


def test_abort_ignores_unknown_ids_and_refuses_wrong_bodies(live: Any) -> None:
    assert httpx.post(live.admin + "/admin/abort", json={"request_id": "gen-0"}).status_code == 200
    answer = httpx.post(live.admin + "/admin/abort", json={"id": "gen-0"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unknown_parameter"


def test_reset_prefix_cache_empties_it(live: Any) -> None:
    httpx.post(live.rest + "/v1/completions", json={"prompt": "The quick brown fox " * 8, "max_tokens": 1})
    live.assert_idle()

    def cached() -> int:
        return live.frontend.engine.status.stats.pages_cached

    live.until(lambda: cached() > 0)
    assert httpx.post(live.admin + "/admin/reset_prefix_cache").status_code == 200
    live.until(lambda: cached() == 0)


def test_drain_makes_the_server_unready(start_front: Callable[..., Any]) -> None:
    live = start_front()
    assert httpx.post(live.admin + "/admin/drain").status_code == 200
    assert httpx.get(live.admin + "/health/ready").status_code == 503
    assert httpx.get(live.rest + "/health/live").status_code == 200


def test_control_takes_no_get(live: Any) -> None:
    for path in ("/admin/drain", "/admin/abort", "/admin/reset_prefix_cache"):
        assert httpx.get(live.admin + path).status_code == 405


def refused(answer: httpx.Response) -> bool:
    if answer.status_code != 403:
        return False
    assert answer.json()["error"]["code"] == "permission_denied"
    return True


PATHS = ["/metrics", "/health", "/admin/status", "/nowhere"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8081",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "192.0.2.1",
        "[2001:db8::1]:1",
        "",
        "[",
        ":80",
    ],
)
def test_a_host_that_is_not_this_one_is_refused(live: Any, host: str, path: str) -> None:
    assert refused(httpx.get(live.admin + path, headers={"Host": host}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8:1", "localhost", "LocalHost:9", "[::1]:8081", "[::1]"])
def test_any_loopback_host_is_this_one(live: Any, host: str) -> None:
    assert httpx.get(live.admin + "/metrics", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://127.0.0.1:1",
        "http://localhost",
        "file://",
        "",
        "http://127.0.0.1:8081.evil.example",
    ],
)
def test_a_page_of_another_site_is_refused(live: Any, origin: str) -> None:
    assert refused(httpx.post(live.admin + "/admin/reset_prefix_cache", headers={"Origin": origin}))
    own = live.admin
    headers = [("Origin", own), ("Origin", origin)]
    assert refused(httpx.post(live.admin + "/admin/reset_prefix_cache", headers=headers))


def test_a_page_of_this_host_is_not(live: Any) -> None:
    answer = httpx.post(live.admin + "/admin/reset_prefix_cache", headers={"Origin": live.admin})
    assert answer.status_code == 200


def test_on_all_addresses_any_address_is_this_host_and_no_name_is(start_live: Callable[..., Any]) -> None:
    live = start_live(admin_host="0.0.0.0")
    for host in ("192.0.2.7:8081", "[2001:db8::1]", "localhost"):
        assert httpx.get(live.admin + "/metrics", headers={"Host": host}).status_code == 200
    assert refused(httpx.get(live.admin + "/metrics", headers={"Host": "evil.example"}))


def test_with_keys_control_needs_one_and_metrics_and_health_do_not(start_live: Callable[..., Any]) -> None:
    live = start_live(api_key=("the-secret",))
    for path in ("/metrics", "/health", "/health/live", "/health/ready", "/version"):
        assert httpx.get(live.admin + path).status_code == 200
    for method, path in (
        ("GET", "/admin/status"),
        ("POST", "/admin/drain"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
    ):
        assert httpx.request(method, live.admin + path).status_code == 401
    shown = httpx.get(live.admin + "/admin/status", headers={"Authorization": "Bearer the-secret"})
    assert shown.status_code == 200 and shown.json()["settings"]["api_key"] == "(1 set)"
    assert "the-secret" not in shown.text


def test_the_public_port_has_neither_metrics_nor_control(live: Any) -> None:
    for method, path in (
        ("GET", "/metrics"),
        ("GET", "/admin/status"),
        ("POST", "/admin/drain"),
        ("POST", "/admin/abort"),
    ):
        assert httpx.request(method, live.rest + path).status_code == 404


def test_a_refusal_takes_no_longer_for_a_body_that_is_still_coming(live: Any) -> None:
    def slow() -> Any:
        yield b"{"
        time.sleep(0.1)
        yield b"}"

    assert refused(httpx.post(live.admin + "/admin/abort", content=slow(), headers={"Host": "evil.example"}))
