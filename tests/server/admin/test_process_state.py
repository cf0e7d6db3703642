"""What /admin/status tells of the process: counts that rise with what runs, and fall with its end."""

from typing import Any

import httpx

COUNTS = ("open_calls", "tasks")


def test_counts_rise_with_a_stream_and_come_back(live: Any) -> None:
    with httpx.Client() as admin:

        def counts() -> tuple[int, ...]:
            process = admin.get(live.admin + "/admin/status").json()["process"]
            assert process["threads"] > 1 and process["open_files"] > 3
            assert process["resident_bytes"] > process["memory_blocks"] > 0
            return tuple(process[name] for name in COUNTS)

        counts()
        before = counts()  # the connection that asks is among them
        body = {"prompt": ["a"] * 64, "max_tokens": 250, "ignore_eos": True, "stream": True}  # it takes seconds
        with httpx.stream("POST", live.rest + "/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()  # to drop it would drop the connection
            next(lines)
            during = counts()
        risen = [now > then for now, then in zip(during, before, strict=True)]
        assert all(risen), (COUNTS, before, during)
        live.until(lambda: all(now <= then for now, then in zip(counts(), before, strict=True)))
