"""One OpenTelemetry span a request, made from its record when it ended and sent over OTLP/HTTP in the background.

Needs the `otel` extra; without settings.otlp_traces_endpoint nothing of it is imported.
"""

import threading
import time
from typing import TYPE_CHECKING, Any

from jaxserve.errors import ConfigError
from server.errors import CODES
from server.observability.records import RequestRecord
from server.settings import ServerSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

INSTALL = "pip install 'jaxserve[otel]'"


def request_traces(settings: ServerSettings) -> "RequestTraces | None":
    """None where tracing is off. Raises ConfigError if the packages are missing."""
    endpoint = settings.otlp_traces_endpoint
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"otlp_traces_endpoint={endpoint!r} needs OpenTelemetry: {INSTALL}") from error
    return RequestTraces(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))


class RequestTraces:
    """Listens to finished requests. processor: what takes the spans; owned.

    The usual OTEL_* variables (service name, resource attributes, sampler, headers) are obeyed. A span is the child of
    the traceparent its client sent, and sampled as that says.
    """

    def __init__(self, processor: "SpanProcessor"):
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # the environment names none
            resource = resource.merge(Resource({SERVICE_NAME: "jaxserve"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("jaxserve")
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, record: RequestRecord) -> None:
        from opentelemetry.trace import SpanKind, StatusCode

        wall = time.time_ns() - round(time.monotonic() * 1e9)  # of time.monotonic() = 0; anew, for clocks are set

        def at(instant: float) -> int:
            return wall + round(instant * 1e9)

        parent = self._propagator.extract({"traceparent": record.traceparent}) if record.traceparent else None
        span = self._tracer.start_span(
            "llm_request",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=span_attributes(record),
            start_time=at(record.metrics.arrival_time),
        )
        if record.metrics.first_token_time is not None:
            span.add_event("first_token", timestamp=at(record.metrics.first_token_time))
        if record.error_code is not None:
            span.set_attribute("error.type", record.error_code)
            if CODES[record.error_code].http >= 500:
                span.set_status(StatusCode.ERROR, record.error_code)
        span.end(at(record.finished_time))

    def close(self, timeout: float = 5.0) -> None:
        """Sends what is left, for at most `timeout` seconds: a collector that is gone shall not hold up the exit."""
        closing = threading.Thread(target=self._provider.shutdown, name="otel-close", daemon=True)
        closing.start()
        closing.join(timeout)


def span_attributes(record: RequestRecord) -> dict[str, Any]:
    """Names of OpenTelemetry's conventions for generative AI, and of vLLM where those have none; seconds."""
    metrics = record.metrics
    attributes = {
        "gen_ai.operation.name": "chat" if "chat" in record.endpoint.lower() else "text_completion",
        "gen_ai.provider.name": "jaxserve",
        "gen_ai.request.id": record.request_id,
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.request.max_tokens": record.max_tokens,
        "gen_ai.request.n": record.n,
        "gen_ai.response.finish_reasons": [reason for reason in record.finish_reasons if reason],
        "gen_ai.usage.prompt_tokens": record.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": record.num_generated_tokens,
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_generated_tokens,
        "gen_ai.usage.cached_tokens": record.num_cached_tokens,
        "gen_ai.latency.time_in_queue": metrics.queue_time,
        "gen_ai.latency.time_to_first_token": metrics.time_to_first_token,
        "gen_ai.latency.time_in_model_prefill": record.prefill_time,
        "gen_ai.latency.time_in_model_decode": record.decode_time,
        "gen_ai.latency.time_in_model_inference": record.inference_time,
        "gen_ai.latency.e2e": record.e2e_time,
        "jaxserve.client_request_id": record.client_request_id,
        "jaxserve.endpoint": record.endpoint,
        "jaxserve.num_preemptions": metrics.preemptions,
    }
    return {name: value for name, value in attributes.items() if value is not None}
