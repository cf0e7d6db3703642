"""What the application as a whole decides: who may embed it, which pages it has, which modules it may load."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

ORIGIN = {"Origin": "https://app.example"}
PREFLIGHT = {**ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def test_cors_is_off_by_default(live: Any) -> None:
    answer = httpx.get(live.rest + "/v1/models", headers=ORIGIN)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert httpx.options(live.rest + "/v1/models", headers=PREFLIGHT).status_code == 405


def test_an_allowed_origin_may_read_answers_and_errors(start_live: Callable[..., Any]) -> None:
    live = start_live(allowed_origins=("https://app.example",), api_key=("key",))
    preflight = httpx.options(live.rest + "/v1/completions", headers=PREFLIGHT)
    assert preflight.status_code == 200, "a browser asks without the key"
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    for key, status in (("key", 200), ("wrong", 401)):
        answer = httpx.get(live.rest + "/v1/models", headers={**ORIGIN, "Authorization": f"Bearer {key}"})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
    other = httpx.get(live.rest + "/v1/models", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_the_playground_is_a_page_that_can_be_left_out(live: Any, start_live: Callable[..., Any]) -> None:
    page = httpx.get(live.rest + "/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    without = httpx.get(start_live(playground=False).rest + "/")
    assert (without.status_code, without.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("module", ["server.rest.app", "server.admin.app", "server.rest.listener"])
def test_no_route_loads_jax(module: str) -> None:
    script = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    root = Path(__file__).parents[3]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
