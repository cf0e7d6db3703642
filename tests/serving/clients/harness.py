"""What every client program has: where the servers are, and a `main` that runs its checks and tells how each went.

In: the environment variables below. Out: one JSON object a check on standard output, {"check", "error"}; error is a
traceback or null. Runs in the environment of whichever client is tried, so it needs Python alone.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

REST = os.environ.get("TEST_REST", "")  # http://127.0.0.1:port
GRPC = os.environ.get("TEST_GRPC", "")  # 127.0.0.1:port
MODEL = os.environ.get("TEST_MODEL", "")
KEYED_REST = os.environ.get("TEST_KEYED_REST", "")  # a server that asks for a key
KEYED_GRPC = os.environ.get("TEST_KEYED_GRPC", "")
KEY = os.environ.get("TEST_KEY", "")

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Name three colours of the rainbow."}]


def main(program: dict[str, Any]) -> None:
    """program: the globals of a client program, whose functions check_… are run in the order they stand in."""
    checks: list[Callable[[], None]] = [value for name, value in program.items() if name.startswith("check_")]
    for check in checks:
        error = None
        try:
            check()
        except Exception:
            error = traceback.format_exc()
        sys.stdout.write(json.dumps({"check": check.__name__, "error": error}) + "\n")
        sys.stdout.flush()


def raised(kind: type[Exception], call: Callable[[], Any]) -> Any:
    """The exception of this kind that `call` raises."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} was raised")
