"""GET /v1/engine/status tells what the engine does; the playground page is served with a policy that fits it."""

import base64
import hashlib
import re
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "server/rest/playground.html"


def status_of(live: Any, **options: Any) -> dict[str, Any]:
    answer = httpx.get(f"{live.rest}/v1/engine/status", **options)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_status_tells_limits_defaults_and_where_grpc_is(live: Any) -> None:
    status = status_of(live)
    assert (status["object"], status["model"], status["phase"]) == ("engine.status", live.model, "ready")
    assert (status["max_num_seqs"], status["page_size"], status["max_model_len"]) == (4, 8, 256)
    assert status["pages_total"] == live.frontend.engine.status.stats.pages_total == 128
    assert status["grpc_port"] == int(live.grpc.rpartition(":")[2])
    assert status["defaults"]["temperature"] == 0.7  # generation_config.json's
    assert status["defaults"]["top_k"] == 40
    assert status["defaults"]["repetition_penalty"] == 1.0


def test_status_counts_what_was_generated(live: Any) -> None:
    before = status_of(live)
    body = {"prompt": "The quick brown fox", "max_tokens": 7, "ignore_eos": True}
    assert httpx.post(f"{live.rest}/v1/completions", json=body).status_code == 200
    live.assert_idle()
    after = status_of(live)
    assert after["generated_tokens"] == before["generated_tokens"] + 7
    assert after["at"] > before["at"]
    assert after["running"] == after["waiting"] == after["pages_used"] == 0
    assert after["pages_cached"] > 0


def test_status_needs_the_key_and_the_page_does_not(start_front: Callable[..., Any]) -> None:
    live = start_front(api_key=("sesame",))
    refused = httpx.get(f"{live.rest}/v1/engine/status")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert status_of(live, headers={"Authorization": "Bearer sesame"})["model"] == live.model
    assert httpx.get(live.rest).status_code == 200


def test_page_is_served_as_it_is_with_a_policy_of_its_own_hashes(live: Any) -> None:
    answer = httpx.get(live.rest)
    assert answer.status_code == 200
    assert answer.content == PAGE.read_bytes()
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for kind in ("script", "style"):
        (inline,) = re.findall(rf"<{kind}>(.*?)</{kind}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"


def test_page_a_browser_has_is_not_sent_again(live: Any) -> None:
    tag = httpx.get(live.rest).headers["etag"]
    again = httpx.get(live.rest, headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    head = httpx.head(live.rest)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", tag)


def test_page_can_be_switched_off(start_front: Callable[..., Any]) -> None:
    live = start_front(playground=False)
    answer = httpx.get(live.rest)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_page_names_no_other_origin() -> None:
    page = PAGE.read_text()
    namespaces = {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[^\s'\"`<>]+", page)) <= namespaces
    for reference in re.findall(r"(?:src|href|action)=[\"']?([^\"'\s>]+)", page):
        assert reference.startswith(("#", "data:")), reference
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert "@import" not in style
    assert "url(" not in style


def test_page_never_parses_text_as_html() -> None:
    page = PAGE.read_text()
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
    ):
        assert sink not in page
    assert not re.search(r"<[^>]*\son\w+=", page)  # inline handlers, which the policy would block


def test_page_is_in_the_wheel() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["server"]
    assert any(fnmatch(str(PAGE.relative_to(ROOT / "server")), pattern) for pattern in patterns)
