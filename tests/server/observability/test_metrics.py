"""/metrics counts what happened: requests as their observer saw them, the engine as it last described itself."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.engine.stats import EngineStats
from server.frontend.engine_client import EngineInfo, EngineStatus
from server.observability.catalog import ADMISSION_CODES, CACHE_CONFIG_LABELS, FAMILIES, PHASES
from server.observability.metrics import ServerMetrics
from server.observability.multiprocess import VARIABLE, front_end_died, share_environment
from server.observability.records import RequestRecord

ROOT = Path(__file__).parents[3]

# Families that wait for the engine to describe itself
UNTOLD = {
    "num_requests_running",
    "num_requests_waiting",
    "num_slots",
    "kv_cache_usage_perc",
    "prefix_cache_usage_perc",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "iteration_tokens_total",
    "engine_device_failures",
    "cache_config_info",
}


class Exposed:
    """A parsed /metrics body."""

    def __init__(self, body: bytes):
        self.families = {family.name: family for family in text_string_to_metric_families(body.decode())}
        self.samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, prefix: str = "jaxserve", **labels: str) -> float:
        every = {"model_name": "tiny", "engine": "0", **labels}
        return self.samples[f"{prefix}:{name}", *sorted(every.items())]

    def without_process(self) -> dict[Any, float]:
        return {key: value for key, value in self.samples.items() if not key[0].startswith("process_")}


def exposed(metrics: ServerMetrics) -> Exposed:
    return Exposed(metrics.render()[0])


def test_a_request_is_counted_once_in_every_histogram(make_metrics: Callable[..., ServerMetrics], drive: Any) -> None:
    metrics = make_metrics()
    drive(metrics).run()
    shown = exposed(metrics)
    sums = {
        "time_to_first_token_seconds": 0.5,
        "e2e_request_latency_seconds": 1.5,
        "request_queue_time_seconds": 0.25,
        "request_prefill_time_seconds": 0.25,
        "request_decode_time_seconds": 1.0,
        "request_inference_time_seconds": 1.25,
        "request_time_per_output_token_seconds": 0.5,
        "request_prompt_tokens": 10,
        "request_prefill_kv_computed_tokens": 6,
        "request_generation_tokens": 3,
        "request_max_num_generation_tokens": 3,
        "request_params_n": 1,
        "request_params_max_tokens": 3,
        "request_num_preemptions": 0,
    }
    assert {name: shown(f"{name}_sum") for name in sums} == pytest.approx(sums)
    assert {shown(f"{name}_count") for name in sums} == {1}
    assert shown("inter_token_latency_seconds_count") == 2
    assert shown("inter_token_latency_seconds_sum") == pytest.approx(1.0)


def test_tokens_are_counted_as_they_come(make_metrics: Callable[..., ServerMetrics], drive: Any) -> None:
    metrics = make_metrics()
    driver = drive(metrics)
    assembler = driver.begin()
    assert exposed(metrics)("prompt_tokens_total") == 0  # not prefilled yet
    driver.tokens(assembler, 1.0, cached=8)
    shown = exposed(metrics)
    assert (shown("prompt_tokens_total"), shown("prompt_tokens_cached_total")) == (10, 8)
    assert (shown("generation_tokens_total"), shown("open_requests")) == (1, 1)
    driver.finish(assembler, 2.0, "cancelled")
    assert exposed(metrics)("open_requests") == 0


def test_a_gap_is_shared_by_the_tokens_that_came_together(
    make_metrics: Callable[..., ServerMetrics], drive: Any
) -> None:
    metrics = make_metrics()
    driver = drive(metrics)
    assembler = driver.begin()
    driver.tokens(assembler, 1.0, count=3)  # the first token's messages have no gap before them
    driver.tokens(assembler, 1.36, count=4)
    driver.tokens(assembler, 1.36, count=0, finish_reason="stop")
    shown = exposed(metrics)
    assert shown("inter_token_latency_seconds_count") == 4
    assert shown("inter_token_latency_seconds_sum") == pytest.approx(0.36)
    assert shown("inter_token_latency_seconds_bucket", le="0.1") == 4
    assert shown("inter_token_latency_seconds_bucket", le="0.07") == 0


def test_gaps_are_those_of_one_sample_not_of_the_request(
    make_metrics: Callable[..., ServerMetrics], drive: Any
) -> None:
    metrics = make_metrics()
    driver = drive(metrics)
    assembler = driver.begin(n=2)
    for at in (1.0, 3.0):
        driver.tokens(assembler, at, index=0)
        driver.tokens(assembler, at, index=1)
    shown = exposed(metrics)
    assert shown("inter_token_latency_seconds_sum") == pytest.approx(4.0)
    assert shown("inter_token_latency_seconds_count") == 2
    assert shown("time_to_first_token_seconds_count") == 1
    assert shown("prompt_tokens_total") == 10


def test_every_sample_counts_by_how_it_ended(make_metrics: Callable[..., ServerMetrics], drive: Any) -> None:
    metrics = make_metrics()
    driver = drive(metrics)
    assembler = driver.begin(n=3)
    driver.tokens(assembler, 1.0, index=0, finish_reason="stop")
    driver.tokens(assembler, 1.0, index=1, finish_reason="length")
    driver.finish(assembler, 2.0, "cancelled")
    shown = exposed(metrics)
    counts = {reason: shown("request_success_total", finished_reason=reason) for reason in ("stop", "length", "abort")}
    assert counts == {"stop": 1, "length": 1, "abort": 1}
    assert shown("errors_total", code="cancelled") == 1
    assert shown("e2e_request_latency_seconds_count") == 0  # it was cut short


def test_a_finished_request_of_a_call_that_failed_did_not_fail(
    make_metrics: Callable[..., ServerMetrics], drive: Any
) -> None:
    metrics = make_metrics()
    driver = drive(metrics)
    done, lost = driver.begin(), driver.begin()
    driver.tokens(done, 1.0, finish_reason="stop")
    driver.tokens(lost, 1.0)
    for assembler in (done, lost):
        driver.finish(assembler, 2.0, "engine_dead")
    shown = exposed(metrics)
    assert shown("errors_total", code="engine_dead") == 1
    assert shown("e2e_request_latency_seconds_sum") == pytest.approx(1.0)
    assert shown("e2e_request_latency_seconds_count") == 1


@pytest.mark.parametrize(
    ("code", "reason"), [("engine_dead", "error"), ("deadline_exceeded", "abort"), ("draining", "abort")]
)
def test_a_request_that_never_ran_has_no_latencies(
    code: str, reason: str, make_metrics: Callable[..., ServerMetrics], drive: Any
) -> None:
    metrics = make_metrics()
    driver = drive(metrics)
    driver.finish(driver.begin(), 5.0, code)
    shown = exposed(metrics)
    assert shown("request_success_total", finished_reason=reason) == 1
    assert shown("errors_total", code=code) == 1
    assert shown("request_prompt_tokens_count") == 1
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time", "e2e_request_latency"):
        assert shown(f"{name}_seconds_count") == 0
    assert shown("prompt_tokens_total") == 0


def test_preemptions_of_a_request_are_noted(make_metrics: Callable[..., ServerMetrics], drive: Any) -> None:
    metrics = make_metrics()
    driver = drive(metrics)
    assembler = driver.begin()
    driver.tokens(assembler, 1.0, preemptions=3, finish_reason="stop")
    driver.finish(assembler, 1.5)
    assert exposed(metrics)("request_num_preemptions_sum") == 3


def test_a_refusal_is_an_error_and_some_are_admission_rejections(make_metrics: Callable[..., ServerMetrics]) -> None:
    metrics = make_metrics()
    metrics.rejected("queue_full")
    metrics.rejected("invalid_value")
    shown = exposed(metrics)
    assert shown("errors_total", code="queue_full") == shown("errors_total", code="invalid_value") == 1
    assert sum(shown("admission_rejections_total", reason=code) for code in ADMISSION_CODES) == 1
    assert shown("admission_rejections_total", reason="queue_full") == 1
    assert set(ADMISSION_CODES) == {"queue_full", "not_ready", "draining"}


def test_listeners_get_the_record_and_cannot_hurt(
    make_metrics: Callable[..., ServerMetrics], drive: Any, call: Any, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = make_metrics()
    records: list[RequestRecord] = []

    def broken(record: RequestRecord) -> None:
        raise OSError("disk full")

    metrics.listen(broken)
    metrics.listen(records.append)
    assembler = drive(metrics).run(call("/v1/chat/completions", "mine", "00-1-2-01"))
    [record] = records
    assert (record.request_id, record.client_request_id) == (assembler.request.id, "mine")
    assert (record.endpoint, record.traceparent, record.model) == ("/v1/chat/completions", "00-1-2-01", "tiny")
    assert (record.num_prompt_tokens, record.num_cached_tokens) == (10, 4)
    assert (record.num_generated_tokens, record.max_generated_tokens) == (3, 3)
    assert (record.finish_reasons, record.error_code, record.n, record.max_tokens) == (("length",), None, 1, 3)
    assert record.e2e_time == pytest.approx(1.5)
    assert "disk full" in caplog.text


def test_a_client_that_names_no_id_is_known_by_ours(
    make_metrics: Callable[..., ServerMetrics], drive: Any, call: Any
) -> None:
    metrics = make_metrics()
    records: list[RequestRecord] = []
    metrics.listen(records.append)
    drive(metrics).run(call(client_request_id=""))
    assert records[0].client_request_id == records[0].request_id


def test_the_engine_is_shown_as_it_last_described_itself(
    make_metrics: Callable[..., ServerMetrics],
    make_stats: Callable[..., EngineStats],
    engine: Any,
    engine_info: EngineInfo,
) -> None:
    engine.info = engine_info
    engine.status = EngineStatus(phase="ready", heard=998.5, step_started=999.75, restarts=2, stats=make_stats())
    shown = exposed(make_metrics())
    values = {
        "num_requests_running": 3,
        "num_requests_waiting": 5,
        "num_slots": 8,
        "kv_cache_usage_perc": 0.25,
        "prefix_cache_usage_perc": 0.15,
        "prefix_cache_queries_total": 1000,
        "prefix_cache_hits_total": 250,
        "num_preemptions_total": 2,
        "engine_device_failures_total": 1,
        "engine_restarts_total": 2,
        "engine_up": 1,
        "engine_heartbeat_age_seconds": 1.5,
        "engine_step_age_seconds": 0.25,
        "server_ready": 1,
        "iteration_tokens_total_sum": 20_048,
        "iteration_tokens_total_count": 10,
    }
    assert {name: shown(name) for name in values} == pytest.approx(values)
    buckets = {le: shown("iteration_tokens_total_bucket", le=le) for le in ("1.0", "2.0", "8.0", "16384.0", "+Inf")}
    assert buckets == {"1.0": 0, "2.0": 4, "8.0": 9, "16384.0": 9, "+Inf": 10}
    sizes = ("16", "200", "8", "512", "2048", "float32")
    assert shown("cache_config_info", **dict(zip(CACHE_CONFIG_LABELS, sizes, strict=True))) == 1


@pytest.mark.parametrize("phase", PHASES)
def test_exactly_the_phase_of_the_engine_is_1(
    phase: Any, make_metrics: Callable[..., ServerMetrics], engine: Any
) -> None:
    engine.status = EngineStatus(phase=phase)
    shown = exposed(make_metrics())
    assert [name for name in PHASES if shown("engine_phase", phase=name)] == [phase]
    assert shown("engine_up") == (phase == "ready")


@pytest.mark.parametrize("phase", ["restarting", "dead"])
def test_nothing_runs_in_an_engine_that_is_gone_but_its_counters_stay(
    phase: Any, make_metrics: Callable[..., ServerMetrics], make_stats: Callable[..., EngineStats], engine: Any
) -> None:
    engine.status = EngineStatus(phase=phase, heard=900.0, stats=make_stats())
    shown = exposed(make_metrics())
    assert shown("num_requests_running") == shown("num_requests_waiting") == shown("kv_cache_usage_perc") == 0
    assert shown("prefix_cache_hits_total") == 250
    assert shown("engine_heartbeat_age_seconds") == 100


def test_before_the_engine_says_anything_its_age_is_that_of_the_server(
    make_metrics: Callable[..., ServerMetrics], engine: Any
) -> None:
    metrics = make_metrics()
    engine.now += 7
    engine.ready = False
    shown = exposed(metrics)
    assert shown("engine_heartbeat_age_seconds") == 7
    assert shown("server_ready") == shown("engine_up") == 0


def test_what_the_engine_has_not_told_is_not_shown_as_0(make_metrics: Callable[..., ServerMetrics]) -> None:
    """Asked after another front end that knew it, a 0 would be a counter reset that never was."""
    shown = exposed(make_metrics())
    missing = {f"jaxserve:{family.name}" for family in FAMILIES} - shown.families.keys()
    assert {name.removeprefix("jaxserve:") for name in missing} == UNTOLD


@pytest.mark.parametrize("openmetrics", [False, True])
def test_every_family_of_the_catalog_and_no_other_is_exposed_with_its_labels(
    openmetrics: bool,
    make_metrics: Callable[..., ServerMetrics],
    make_stats: Callable[..., EngineStats],
    engine: Any,
    engine_info: EngineInfo,
) -> None:
    engine.info, engine.status = engine_info, EngineStatus(phase="ready", stats=make_stats())
    body, content_type = make_metrics().render(openmetrics)
    assert content_type.startswith("application/openmetrics-text" if openmetrics else "text/plain")
    parse = openmetrics_parser.text_string_to_metric_families if openmetrics else text_string_to_metric_families
    found = {family.name: family for family in parse(body.decode()) if not family.name.startswith("process_")}
    assert {name: family.type for name, family in found.items()} == {
        f"jaxserve:{family.name}": family.kind for family in FAMILIES
    }
    assert not any(sample.name.endswith("_created") for family in found.values() for sample in family.samples)
    for family in FAMILIES:
        shown = found[f"jaxserve:{family.name}"]
        own = {family.label} if family.label else set()
        own |= set(CACHE_CONFIG_LABELS) if family.name == "cache_config_info" else set()
        for sample in shown.samples:
            assert sample.labels.keys() - {"le"} == {"model_name", "engine"} | own
        if family.label:
            assert {sample.labels[family.label] for sample in shown.samples} == set(family.values)


def test_another_prefix_changes_the_names_and_nothing_else(
    make_metrics: Callable[..., ServerMetrics], drive: Any
) -> None:
    ours, theirs = make_metrics(), make_metrics(metrics_prefix="vllm")
    for metrics in (ours, theirs):
        drive(metrics, start=0.0).run()
    renamed = {
        (key[0].replace("vllm:", "jaxserve:"), *key[1:]): value for key, value in exposed(theirs).samples.items()
    }
    renamed = {key: value for key, value in renamed.items() if not key[0].startswith("process_")}
    assert renamed == exposed(ours).without_process()
    assert exposed(theirs)("generation_tokens_total", prefix="vllm") == 3


def test_two_servers_in_one_process_do_not_share_counts(make_metrics: Callable[..., ServerMetrics], drive: Any) -> None:
    one, other = make_metrics(), make_metrics()
    drive(one).run()
    assert exposed(one)("generation_tokens_total") == 3
    assert exposed(other)("generation_tokens_total") == 0


SCRIPT = """
import sys, time
from server.frontend.engine_client import EngineStatus
from server.observability.metrics import ServerMetrics
from server.settings import ServerSettings

class Call:
    endpoint, client_request_id, traceparent = "/v1/completions", "", None

metrics = ServerMetrics(ServerSettings(), "tiny", lambda: EngineStatus(), lambda: None, lambda: True)
for i in range(int(sys.argv[1])):
    metrics.rejected("queue_full")
    metrics.begin(f"gen-{i}", Call())
print("done", flush=True)
sys.stdin.readline()
sys.stdout.write(metrics.render()[0].decode())
"""


@pytest.fixture
def front_ends(tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """front_ends(n): a process that shares tmp_path, refused n calls, opened n requests and waits for a line."""
    started: list[subprocess.Popen[str]] = []

    def start(count: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(count)],
            cwd=ROOT,
            env={**os.environ, VARIABLE: str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout and process.stdout.readline() == "done\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def rendered_by(process: "subprocess.Popen[str]") -> Exposed:
    return Exposed(process.communicate("\n")[0].encode())


def test_any_front_end_answers_for_all_and_keeps_what_a_dead_one_counted(
    front_ends: Callable[[int], "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    (tmp_path / "counter_1.db").write_bytes(b"of an earlier server")
    assert share_environment(tmp_path) == {VARIABLE: str(tmp_path)}
    first, second, third = front_ends(2), front_ends(3), front_ends(4)
    shown = rendered_by(third)
    assert shown("errors_total", code="queue_full") == shown("open_requests") == 9
    first.kill()
    first.wait()
    front_end_died(tmp_path, first.pid)
    front_end_died(tmp_path, third.pid)
    shown = rendered_by(second)
    assert shown("errors_total", code="queue_full") == 9
    assert shown("open_requests") == 3
    assert shown("engine_up") == 0
    assert shown.families.keys() == {f"jaxserve:{family.name}" for family in FAMILIES if family.name not in UNTOLD}
