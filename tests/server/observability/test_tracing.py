"""One span a request, made when it ends: right times, right parent, and no text."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from jaxserve.errors import ConfigError
from server.observability.metrics import ServerMetrics
from server.observability.tracing import RequestTraces, request_traces
from server.settings import ServerSettings

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
PARENT_ID = 0xB7AD6B7169203331


@pytest.fixture
def memory() -> Iterator[tuple[RequestTraces, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    traces = RequestTraces(SimpleSpanProcessor(exporter))
    yield traces, exporter
    traces.close()


@pytest.fixture
def traced(
    memory: tuple[RequestTraces, InMemorySpanExporter], make_metrics: Callable[..., ServerMetrics]
) -> tuple[ServerMetrics, InMemorySpanExporter]:
    traces, exporter = memory
    metrics = make_metrics()
    metrics.listen(traces)
    return metrics, exporter


def test_a_span_tells_model_tokens_and_latencies(traced: Any, drive: Any, call: Any) -> None:
    metrics, exporter = traced
    drive(metrics).run(call("/v1/chat/completions"))
    [span] = exporter.get_finished_spans()
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.usage.prompt_tokens": 10,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.usage.cached_tokens": 4,
        "gen_ai.response.finish_reasons": ("length",),
        "jaxserve.client_request_id": "client-1",
        "jaxserve.endpoint": "/v1/chat/completions",
    }
    assert {name: span.attributes[name] for name in expected} == expected
    latencies = {"time_in_queue": 0.25, "time_to_first_token": 0.5, "time_in_model_decode": 1.0, "e2e": 1.5}
    assert {name: span.attributes[f"gen_ai.latency.{name}"] for name in latencies} == pytest.approx(latencies)
    assert (span.kind, span.status.status_code) == (SpanKind.SERVER, StatusCode.UNSET)
    assert span.resource.attributes["service.name"] == "jaxserve"
    assert span.parent is None


def test_a_span_lies_in_wall_clock_time(traced: Any, drive: Any) -> None:
    metrics, exporter = traced
    started = time.time_ns()
    drive(metrics).run()  # arrives now, its last token comes 1.5 s from now
    elapsed = time.time_ns() - started
    [span] = exporter.get_finished_spans()
    assert 0 <= span.start_time - started <= elapsed + 1_000_000
    assert span.end_time - span.start_time == pytest.approx(1.5e9, rel=1e-6)
    [event] = span.events
    assert (event.name, event.timestamp - span.start_time) == ("first_token", pytest.approx(0.5e9, rel=1e-6))


def test_a_span_is_the_child_of_what_the_client_sent(traced: Any, drive: Any, call: Any, traceparent: str) -> None:
    metrics, exporter = traced
    drive(metrics).run(call(traceparent=traceparent))
    [span] = exporter.get_finished_spans()
    assert (span.context.trace_id, span.parent.span_id) == (TRACE_ID, PARENT_ID)


@pytest.mark.parametrize(
    "sent", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ff" * 40, "00-\n-\x00-01"]
)
def test_a_bad_traceparent_starts_a_trace_of_its_own(sent: str, traced: Any, drive: Any, call: Any) -> None:
    metrics, exporter = traced
    drive(metrics).run(call(traceparent=sent))
    [span] = exporter.get_finished_spans()
    assert span.parent is None and span.context.is_valid


def test_a_client_that_did_not_sample_gets_no_span(traced: Any, drive: Any, call: Any, traceparent: str) -> None:
    metrics, exporter = traced
    drive(metrics).run(call(traceparent=traceparent[:-2] + "00"))
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize(("code", "status"), [("engine_dead", StatusCode.ERROR), ("cancelled", StatusCode.UNSET)])
def test_only_what_the_server_failed_at_is_an_error(code: str, status: StatusCode, traced: Any, drive: Any) -> None:
    metrics, exporter = traced
    driver = drive(metrics)
    driver.finish(driver.begin(), 1.0, code)
    [span] = exporter.get_finished_spans()
    assert (span.attributes["error.type"], span.status.status_code) == (code, status)
    assert "gen_ai.latency.time_to_first_token" not in span.attributes


def test_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch, make_metrics: Any, drive: Any) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-backend")
    exporter = InMemorySpanExporter()
    traces = RequestTraces(SimpleSpanProcessor(exporter))
    metrics = make_metrics()
    metrics.listen(traces)
    drive(metrics).run()
    traces.close()
    assert exporter.get_finished_spans()[0].resource.attributes["service.name"] == "chat-backend"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP/HTTP collector: its URL, and what it has received."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert (self.path, self.headers["Content-Type"]) == ("/v1/traces", "application/x-protobuf")
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_reach_a_collector_at_the_latest_at_close(
    collector: tuple[str, list[ExportTraceServiceRequest]],
    make_metrics: Callable[..., ServerMetrics],
    drive: Any,
    call: Any,
    traceparent: str,
) -> None:
    url, received = collector
    traces = request_traces(ServerSettings(otlp_traces_endpoint=url))
    assert traces is not None
    metrics = make_metrics()
    metrics.listen(traces)
    driver = drive(metrics)
    for _ in range(3):
        driver.run(call(traceparent=traceparent))
    traces.close()
    spans = [
        span
        for request in received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert [span.name for span in spans] == ["llm_request"] * 3
    assert {int.from_bytes(span.trace_id) for span in spans} == {TRACE_ID}


def test_tracing_is_off_by_default_and_imports_nothing() -> None:
    assert request_traces(ServerSettings()) is None
    script = (
        "import sys, server.observability.tracing as t, server.observability.metrics\n"
        "from server.settings import ServerSettings\nt.request_traces(ServerSettings())\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_missing_packages_are_named_with_what_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxserve\[otel\]'"):
        request_traces(ServerSettings(otlp_traces_endpoint="http://127.0.0.1:1/v1/traces"))
