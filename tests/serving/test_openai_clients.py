"""Clients people use for OpenAI's API, each of its own version in its own environment, against the real server.

`make clients` builds the environments; the programs are in `clients/`, where each check_… is one test here.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.serving

HERE = Path(__file__).parent / "clients"
ENVIRONMENTS = Path(__file__).parents[2] / ".venv-clients"
PROGRAMS = {
    "openai": "openai_client.py",
    "openai2": "openai_client.py",
    "langchain": "langchain_client.py",
    "litellm": "litellm_client.py",
    "instructor": "instructor_client.py",
    "npm": "npm_client.js",
}
CHECKS = {name: re.findall(r"\b(check_\w+)\(\)", (HERE / program).read_text()) for name, program in PROGRAMS.items()}
TIMEOUT = 400.0  # seconds, for all checks of one client


@pytest.fixture(scope="module")
def results(server: Any, keyed: Any) -> Callable[[str], dict[str, str | None]]:
    """results(client): what each of its checks ended with; all are run at the first question."""

    @cache
    def of(client: str) -> dict[str, str | None]:
        environment = {
            **os.environ,
            "TEST_REST": server.rest,
            "TEST_GRPC": server.grpc,
            "TEST_MODEL": server.model,
            "TEST_KEYED_REST": keyed.rest,
            "TEST_KEYED_GRPC": keyed.grpc,
            "TEST_KEY": keyed.key,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks the internet for prices
            "NODE_PATH": str(ENVIRONMENTS / client / "node_modules"),
        }
        run = subprocess.run(
            command(client), env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        assert run.returncode == 0, run.stderr
        told = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        return {result["check"]: result["error"] for result in told}

    return of


def command(client: str) -> list[str]:
    home = ENVIRONMENTS / client
    assert (home / ".stamp").exists(), f"{home.name} is not installed: make clients"
    runner = "node" if client == "npm" else str(home / "bin" / "python")
    return [runner, str(HERE / PROGRAMS[client])]


@pytest.mark.parametrize(
    ("client", "check"), [(client, check) for client, checks in CHECKS.items() for check in checks]
)
def test_client(results: Callable[[str], dict[str, str | None]], client: str, check: str) -> None:
    told = results(client)
    assert check in told, f"it never ran; {client} ran {sorted(told)}"
    assert told[check] is None, told[check]
