"""Ten minutes of everything clients do to a server: afterwards it holds what it held before. `make soak`.

JAXSERVE_SOAK_SECONDS changes how long. Traffic comes in rounds; between two of them no client is there, and the idle
server is looked at. After a warm-up, in which pools of threads and buffers grow to their size, its counts must come
back to the same values every time: calls, samples, pages, event-loop tasks, and but for a few files and threads.

Memory has no such value: allocators keep what they were given, garbage waits for its collector, and by how much differs
from round to round. A leak is told from that by what it grows with, the number of calls. So for the second half of the
time the growth a call is estimated as the median of the slopes between all pairs of rounds: no odd round bends it. It
is bounded for resident memory (BYTES_PER_CALL) and for the front end's own Python objects (BLOCKS_PER_CALL), plus what
comes and goes without a leak (SLACK_...). A request that is kept costs the front end over a hundred blocks and over
10 KiB: if one kind of call out of the two dozen kept its own, both bounds would break.
"""

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

SECONDS = float(os.environ.get("JAXSERVE_SOAK_SECONDS", "600"))
WARM_UP = 0.2  # of the time
ROUND_SECONDS = 10.0
BYTES_PER_CALL = 256
SLACK_BYTES = 4 << 20
BLOCKS_PER_CALL = 1.0
SLACK_BLOCKS = 20_000

pytestmark = [pytest.mark.soak, pytest.mark.timeout(SECONDS * 2 + 900)]


def test_server_holds_after_mixed_traffic_what_it_held_before(soak: Any) -> None:
    golden = soak.golden()
    began = time.monotonic()
    rounds = itertools.count()
    seconds = min(ROUND_SECONDS, SECONDS / 8)

    def run_until(share: float, then: Callable[[], Any]) -> list[Any]:
        seen = []
        while time.monotonic() < began + SECONDS * share or len(seen) < 2:
            soak.round(next(rounds), seconds)
            seen.append(then())
            assert soak.golden() == golden
        return seen

    warm = run_until(WARM_UP, soak.settled)
    baseline = highest(warm)
    states = run_until(1.0, lambda: soak.settled(baseline))

    late = states[len(states) // 2 :]
    report(soak, baseline, late, time.monotonic() - began)
    assert soak.alive()
    assert not soak.complaints(), "\n".join(soak.complaints())
    for name in ("open_requests", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert soak.metric(name) == 0
    assert {"ok", "refused: queue_full"} <= soak.done["completion"].keys()
    assert "left" in soak.done["stream_left_early"] and "refused: deadline_exceeded" in soak.done["timeout"]
    calls = late[-1].calls - late[0].calls
    for role in ("core", "front end", "supervisor"):
        grown = growth(late, lambda state, role=role: state.resident[role])
        assert grown <= BYTES_PER_CALL * calls + SLACK_BYTES, f"{role}: {grown / calls:.0f} bytes a call"
    grown = growth(late, lambda state: state.memory_blocks)
    assert grown <= BLOCKS_PER_CALL * calls + SLACK_BLOCKS, f"front end: {grown / calls:.2f} blocks a call"


def test_growth_is_what_one_odd_round_cannot_bend() -> None:
    class Point:
        def __init__(self, calls: int, value: float):
            self.calls, self.value = calls, value

    line = [Point(calls, 3.0 * calls + 7) for calls in range(0, 1000, 100)]
    assert growth(line, lambda point: point.value) == pytest.approx(2700)
    line[4].value += 1e9
    assert growth(line, lambda point: point.value) == pytest.approx(2700)
    flat = [Point(calls, 5.0) for calls in (0, 10, 20)]
    assert growth(flat, lambda point: point.value) == 0


def growth(states: Sequence[Any], value: Callable[[Any], float]) -> float:
    """From the first to the last, along the median slope over calls."""
    slopes = [(value(b) - value(a)) / (b.calls - a.calls) for a, b in itertools.combinations(states, 2)]
    return statistics.median(slopes) * (states[-1].calls - states[0].calls)


def highest(states: Sequence[Any]) -> Any:
    """One state that none of these is above."""

    def most(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {role: max(value[role] for value in values) for role in values[0]}
        return max(values)

    return type(states[0])(**{name: most([getattr(s, name) for s in states]) for name in vars(states[0])})


def report(soak: Any, baseline: Any, late: Sequence[Any], seconds: float) -> None:
    """For `pytest -s`."""
    calls = late[-1].calls - late[0].calls
    print(f"\n{soak.calls} calls in {seconds:.0f} s; in the second half {calls}, {len(late)} rounds")
    print(json.dumps(soak.done))
    print(f"baseline {baseline}\nlast     {late[-1]}")
    for role in late[0].resident:
        grown = growth(late, lambda state, role=role: state.resident[role])
        per_hour = grown / 2**20 / (seconds / 2) * 3600
        print(f"{role}: {grown / calls:+.0f} bytes a call, at this rate {per_hour:+.1f} MiB an hour")
        print("   MiB:", *(f"{state.resident[role] / 2**20:.1f}" for state in late))
    print("front end: blocks", *(state.memory_blocks for state in late))
