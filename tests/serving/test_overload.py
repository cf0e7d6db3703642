"""Four times more than the server sustains, for a minute: it refuses politely, and serves what it accepted.

How fast it refuses is printed and not asserted: other work on the machine must not fail a test. The measured times are
in benchmarks/README.md.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest

pytestmark = pytest.mark.serving

ARRIVALS = Path(__file__).parent / "clients" / "arrivals.py"
SECONDS = 60
OVERLOAD = 4
SLOTS = 8  # of a small server


def load(server: Any, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(ARRIVALS), str(server.port), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def milliseconds(seconds: list[float]) -> str:
    cuts = quantiles(seconds, n=100)
    return f"p50 {cuts[49] * 1e3:.1f} ms, p99 {cuts[98] * 1e3:.1f} ms, longest {max(seconds) * 1e3:.1f} ms"


def test_four_times_overload_is_refused_and_what_is_accepted_completes(start_server: Callable[..., Any]) -> None:
    server = start_server("--max-num-queued-reqs=8")
    load(server, "closed", 2, SLOTS)  # the first requests of a server are slower than the others
    sustained = load(server, "closed", 8, SLOTS)
    rate = len(sustained["results"]) / sustained["seconds"]
    results = load(server, OVERLOAD * rate, SECONDS)["results"]
    accepted = [result for result in results if result["status"] == 200]
    refused = [result for result in results if result["status"] == 429]
    times = [result["seconds"] for result in refused]
    print(f"\nsustained {rate:.1f} requests/s; {len(results)} at {OVERLOAD}x in {SECONDS} s: ", end="")
    print(f"{len(accepted)} accepted, {len(refused)} refused")
    print(f"refusals: {milliseconds(times)}")
    print(f"answers:  {milliseconds([result['seconds'] for result in accepted])}")
    assert len(accepted) + len(refused) == len(results), {result["status"] for result in results}
    assert all(result["complete"] for result in accepted)
    assert all(result["retry_after"] for result in refused)
    assert len(refused) > len(results) / 2, "this was no overload"
    assert len(accepted) > rate * SECONDS / 2, "refusing must not keep it from its work"
    server.assert_idle()
    assert server.health().status_code == 200
