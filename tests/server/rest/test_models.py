"""GET /v1/models and /v1/models/{id}."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.frontend.engine_client import EngineClient


def test_the_list_holds_the_model_as_openai_describes_it(live: Any) -> None:
    answer = httpx.get(live.rest + "/v1/models").json()
    assert answer == {
        "object": "list",
        "data": [
            {
                "id": live.model,
                "object": "model",
                "created": live.frontend.created,
                "owned_by": "jaxserve",
                "root": live.frontend.model_root,
                "parent": None,
                "max_model_len": 256,
            }
        ],
    }


def test_one_model_is_its_entry_of_the_list(live: Any) -> None:
    entry = httpx.get(live.rest + "/v1/models").json()["data"][0]
    assert httpx.get(f"{live.rest}/v1/models/{live.model}").json() == entry


def test_every_served_name_is_a_model_and_may_hold_slashes(start_live: Callable[..., Any]) -> None:
    live = start_live(served_model_name=("org/model", "alias"))
    assert [entry["id"] for entry in httpx.get(live.rest + "/v1/models").json()["data"]] == ["org/model", "alias"]
    for path in ("org/model", "org%2Fmodel"):
        assert httpx.get(f"{live.rest}/v1/models/{path}").json()["id"] == "org/model"


@pytest.mark.parametrize("name", ["gpt-4", "x" * 2000, "..%2f..%2fetc%2fpasswd", "%F0%9F%98%80"])
def test_another_name_gets_404_and_the_nearest_one(live: Any, name: str) -> None:
    answer = httpx.get(f"{live.rest}/v1/models/{name}")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert live.model in error["message"] and len(error["message"]) < 1000


def test_the_list_is_there_before_the_engine(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Starting:
        info: Any = None
        status = live.frontend.engine.status

    engine: EngineClient = Starting()  # type: ignore[assignment]
    monkeypatch.setattr(live.frontend, "engine", engine)
    entry = httpx.get(live.rest + "/v1/models").json()["data"][0]
    assert (entry["id"], entry["max_model_len"]) == (live.model, None)


def test_a_name_cannot_break_a_line(live: Any) -> None:
    body = {"model": 'a\nERROR: forged\r\n\u2028"', "prompt": "a"}
    answer = httpx.post(live.rest + "/v1/completions", json=body)
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert message.isprintable() and "forged" in message
