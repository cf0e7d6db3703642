"""A whole front end: what clients did is what /metrics, records and logs say."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.observability.catalog import FAMILIES
from server.observability.logs import IntervalLog
from server.observability.records import RequestRecord
from server.settings import ServerSettings

PROMPT = "The quick brown fox jumps over the lazy dog. " * 3


class Scrape:
    """/metrics of a live server, by sample name and the labels that are its own."""

    def __init__(self, admin: str, prefix: str = "jaxserve"):
        response = httpx.get(f"{admin}/metrics")
        response.raise_for_status()
        self.names: set[str] = set()
        self.values: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(response.text):
            self.names.add(family.name)
            for sample in family.samples:
                own = [value for label, value in sample.labels.items() if label not in ("model_name", "engine")]
                self.values[sample.name.removeprefix(f"{prefix}:"), "".join(own)] = sample.value

    def __call__(self, name: str, own: str = "") -> float:
        return self.values[name, own]

    def since(self, before: "Scrape") -> Callable[..., float]:
        return lambda name, own="": self(name, own) - before(name, own)


@pytest.fixture
def complete(live: Any) -> Callable[..., httpx.Response]:
    def post(headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
        body = {"model": live.model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **body}
        return httpx.post(f"{live.rest}/v1/completions", json=body, headers=headers, timeout=60)

    return post


@pytest.fixture
def records(live: Any) -> Iterator[list[RequestRecord]]:
    found: list[RequestRecord] = []
    live.frontend.metrics.listen(found.append)
    yield found
    live.frontend.metrics._listeners.remove(found.append)


def test_usage_of_answers_is_what_the_counters_gained(live: Any, complete: Callable[..., httpx.Response]) -> None:
    before = Scrape(live.admin)
    answers = [complete(n=n, ignore_eos=True).json() for n in (1, 2, 3)]
    live.assert_idle()
    gained = Scrape(live.admin).since(before)
    assert gained("generation_tokens_total") == sum(answer["usage"]["completion_tokens"] for answer in answers) == 48
    prompt = answers[0]["usage"]["prompt_tokens"]
    assert gained("prompt_tokens_total") == 3 * prompt
    cached = sum(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers)
    assert gained("prompt_tokens_cached_total") == cached > 0
    assert gained("request_success_total", "length") == 6
    assert gained("inter_token_latency_seconds_count") == 6 * 7
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
        assert gained(f"{name}_seconds_count") == 3
    assert gained("request_params_n_sum") == 6


def test_the_engine_s_series_come_and_its_gauges_go_back_to_zero(
    live: Any, complete: Callable[..., httpx.Response]
) -> None:
    before = Scrape(live.admin)
    assert complete().status_code == 200
    live.assert_idle()
    after = Scrape(live.admin)
    gained = after.since(before)
    assert gained("prefix_cache_queries_total") > 0
    assert gained("iteration_tokens_total_count") > 0
    assert gained("iteration_tokens_total_sum") > 0
    idle = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "open_requests")
    assert [after(name) for name in idle] == [0, 0, 0, 0]
    assert after("engine_up") == after("server_ready") == 1
    assert {f"jaxserve:{family.name}" for family in FAMILIES} <= after.names
    limits = live.frontend.engine.info.limits
    assert after("num_slots") == limits.max_num_seqs


def test_a_client_that_goes_away_is_counted_and_no_failure(live: Any, records: list[RequestRecord]) -> None:
    before = Scrape(live.admin)
    body = {"model": live.model, "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{live.rest}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    live.assert_idle()
    gained = Scrape(live.admin).since(before)
    assert gained("errors_total", "cancelled") == gained("request_success_total", "abort") == 1
    assert gained("e2e_request_latency_seconds_count") == 0
    assert [record.error_code for record in records] == ["cancelled"]


def test_ids_and_trace_of_a_call_reach_its_record_and_no_text_does(
    live: Any, complete: Callable[..., httpx.Response], records: list[RequestRecord], traceparent: str
) -> None:
    answer = complete({"X-Request-Id": "mine-1", "traceparent": traceparent}, prompt="xylophone quagmire", max_tokens=4)
    assert answer.headers["X-Request-Id"] == "mine-1"
    live.assert_idle()
    [record] = records
    assert (record.client_request_id, record.traceparent, record.endpoint) == ("mine-1", traceparent, "/v1/completions")
    assert (record.model, record.n, record.max_tokens) == (live.model, 1, 4)
    assert record.num_prompt_tokens == answer.json()["usage"]["prompt_tokens"]
    assert "xylophone" not in repr(record)


@pytest.mark.parametrize(
    ("body", "code"),
    [({"prompt": "x " * 2000}, "context_length_exceeded"), ({"prompt": ""}, "empty_prompt")],
)
def test_refused_calls_are_counted_by_code(
    body: dict[str, Any], code: str, live: Any, complete: Callable[..., httpx.Response]
) -> None:
    before = Scrape(live.admin)
    assert complete(**body).json()["error"]["code"] == code
    gained = Scrape(live.admin).since(before)
    assert gained("errors_total", code) == 1
    assert gained("request_success_total", "error") == 0


def test_a_full_queue_and_a_drain_are_admission_rejections(start_front: Callable[..., Any]) -> None:
    front = start_front(max_num_queued_reqs=0)
    slots = front.frontend.engine.info.limits.max_num_seqs
    body = {"model": front.model, "prompt": "x", "max_tokens": 4}
    before = Scrape(front.admin)
    front.loop.call_soon_threadsafe(front.frontend.capacity.reserve, slots)
    assert httpx.post(f"{front.rest}/v1/completions", json=body, timeout=60).status_code == 429
    gained = Scrape(front.admin).since(before)
    assert gained("admission_rejections_total", "queue_full") == gained("errors_total", "queue_full") == 1

    async def drain() -> None:
        front.frontend.begin_drain()

    front.call(drain)
    with contextlib.suppress(httpx.HTTPError):
        assert httpx.post(f"{front.rest}/v1/completions", json={**body, "n": 1}, timeout=60).status_code == 503
    after = Scrape(front.admin)
    assert after("admission_rejections_total", "draining") == 1
    assert after("server_ready") == 0


def test_another_prefix_is_served(start_front: Callable[..., Any]) -> None:
    front = start_front(metrics_prefix="vllm")
    scrape = Scrape(front.admin, "vllm")
    assert scrape("engine_up") == 1
    assert not any(name.startswith("jaxserve:") for name in scrape.names)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("*/*", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=1.0.0", "application/openmetrics-text"),
    ],
)
def test_a_scraper_gets_the_format_it_accepts(accept: str, content_type: str, live: Any) -> None:
    response = httpx.get(f"{live.admin}/metrics", headers={"Accept": accept})
    assert response.headers["Content-Type"].startswith(content_type)
    assert "jaxserve:generation_tokens_total" in response.text
    assert response.text.endswith("# EOF\n") == ("openmetrics" in accept)


def test_the_interval_line_tells_what_a_live_engine_did(
    live: Any, complete: Callable[..., httpx.Response], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server")
    log = IntervalLog(ServerSettings(), lambda: live.frontend.engine.status)
    log.tick()
    caplog.clear()
    assert complete(ignore_eos=True).status_code == 200
    log.tick()
    [line] = [record for record in caplog.records if "Avg prompt throughput" in record.message]
    fields = vars(line)["fields"]
    assert fields["prompt_tokens_per_second"] > 0 and fields["generated_tokens_per_second"] > 0
    json.dumps(fields)
