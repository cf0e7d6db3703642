"""Health answers with a status for probes and a cause for people; /version, and the way to them."""

from typing import Any

import httpx
import pytest

import jaxserve
from server.frontend.health import HealthReport

PATHS = {"/health/live": "live", "/health/ready": "ready", "/health": "ready", "/ping": "ready"}
PORTS = ["rest", "admin"]


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("path", PATHS)
def test_a_healthy_server_answers_200_and_no_cause(live: Any, path: str, port: str) -> None:
    answer = httpx.get(getattr(live, port) + path)
    body = answer.json()
    assert (answer.status_code, body["status"], body["cause"]) == (200, "ok", None)
    assert body["phase"] == "ready" and body["steps"] >= 0
    assert answer.headers["cache-control"] == "no-store" and "retry-after" not in answer.headers


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize(("path", "question"), PATHS.items())
def test_an_unhealthy_server_answers_503_and_the_cause(
    live: Any, path: str, question: str, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = HealthReport(False, "one step has been running for 31.0 s", {"step_age_seconds": 31.0})
    monkeypatch.setattr(live.frontend.health, question, lambda: report)
    answer = httpx.get(getattr(live, port) + path)
    assert answer.status_code == 503
    assert answer.json() == {"status": "unavailable", "cause": report.cause, "step_age_seconds": 31.0}
    assert int(answer.headers["retry-after"]) >= 1


def test_a_draining_server_lives_and_is_not_ready(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.frontend, "draining", True)
    assert httpx.get(live.rest + "/health/live").status_code == 200
    answer = httpx.get(live.rest + "/health/ready")
    assert answer.status_code == 503 and "draining" in answer.json()["cause"]
    refused = httpx.post(live.rest + "/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["retry-after"]


def test_the_version_is_the_packages(live: Any) -> None:
    assert httpx.get(live.rest + "/version").json() == {"version": jaxserve.__version__}
