"""schemathesis reads /openapi.json and tries what it promises: no 5xx, and every answer as described."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.serving, pytest.mark.timeout(1500)]

SCHEMATHESIS = Path(__file__).parents[2] / ".venv-clients" / "schemathesis" / "bin" / "schemathesis"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)


def test_every_answer_is_as_openapi_describes_it(start_server: Callable[..., Any]) -> None:
    """A short context: a request that is valid by chance and names no max_tokens goes on to its end."""
    assert SCHEMATHESIS.exists(), "schemathesis is not installed: make clients"
    server = start_server("--max-model-len=64", "--api-key=key-of-the-fuzzer")
    command = [
        str(SCHEMATHESIS),
        "run",
        f"{server.rest}/openapi.json",
        "--header=Authorization: Bearer key-of-the-fuzzer",
        f"--checks={','.join(CHECKS)}",
        "--phases=examples,coverage,fuzzing",
        "--max-examples=10",
        "--seed=1",
        "--generation-database=none",
        "--suppress-health-check=all",
        "--request-timeout=300",
        "--continue-on-failure",
        "--no-color",
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    assert not server.failures(), server.failures()
    server.assert_idle()
