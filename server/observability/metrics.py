"""Prometheus metrics of the server: requests are observed here, the engine is read when somebody scrapes.

One process keeps them in memory. Where several front ends share PROMETHEUS_MULTIPROC_DIR (set before this module is
imported, see multiprocess.py), each writes files there and any of them answers for all.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.openmetrics.exposition import ALLOWUTF8, CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from jaxserve.engine.assembler import RequestAssembler
from server.frontend.engine_client import EngineInfo, EngineStatus
from server.observability.catalog import ADMISSION_CODES, COMMON_LABELS, REQUEST_FAMILIES
from server.observability.engine_collector import EngineCollector
from server.observability.multiprocess import shared_directory
from server.observability.records import CallContext, RecordListener, RequestRecord, request_record
from server.settings import ServerSettings

logger = logging.getLogger(__name__)

ENGINE = "0"  # the label's value: there is one engine
ENDED_CODES = ("cancelled", "deadline_exceeded", "draining")  # of requests somebody ended; under any other, they failed


class ServerMetrics:
    """A RequestObserver that counts, and tells listeners of every finished request.

    status, info   the engine as this front end sees it
    ready          what /health/ready would say; None = whether the engine is ready

    `begin`, `tokens`, `finished` are called on the event loop; `rejected` and `render` from any thread.
    """

    def __init__(
        self,
        settings: ServerSettings,
        model_name: str,
        status: Callable[[], EngineStatus],
        info: Callable[[], EngineInfo | None],
        ready: Callable[[], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._model_name = model_name
        self._listeners: list[RecordListener] = []
        self._open: dict[str, _Open] = {}
        self._registry = CollectorRegistry()
        prefix, label_values = settings.metrics_prefix, (model_name, ENGINE)
        if shared_directory() is None:
            bound = _Instruments(prefix, label_values, self._registry)
            ProcessCollector(registry=self._registry)  # of several front ends, every scrape would show another one
        else:
            bound = _Instruments(prefix, label_values, None)
            MultiProcessCollector(self._registry)
        self._counters, self._histograms, self._open_requests = bound.counters, bound.histograms, bound.open_requests
        self._generation_tokens = self._counters["generation_tokens", ""]
        self._inter_token_latency = self._histograms["inter_token_latency_seconds"]
        is_ready = ready or (lambda: status().phase == "ready")
        self._registry.register(EngineCollector(prefix, label_values, status, info, is_ready, clock))

    def listen(self, listener: RecordListener) -> None:
        """`listener` is called on the event loop with the record of every request that ends."""
        self._listeners.append(listener)

    def begin(self, request_id: str, call: CallContext) -> None:
        self._open[request_id] = _Open(call)
        self._open_requests.inc()

    def tokens(self, assembler: RequestAssembler, index: int, count: int, now: float) -> None:
        if not count:
            return
        self._generation_tokens.inc(count)
        state = self._open[assembler.request.id]
        last = state.last_tokens.get(index)
        state.last_tokens[index] = now
        if last is not None:
            gap = (now - last) / count
            for _ in range(count):
                self._inter_token_latency.observe(gap)
        elif len(state.last_tokens) == 1:
            self._first_token(assembler)

    def finished(self, assembler: RequestAssembler, now: float, error_code: str | None) -> None:
        state = self._open.pop(assembler.request.id)
        self._open_requests.dec()
        record = request_record(assembler, state.call, self._model_name, now, error_code)
        self._count(record)
        for listener in self._listeners:
            try:
                listener(record)
            except Exception:  # whatever a log or a trace runs into, the request is not to blame
                logger.exception("a listener failed at the record of request %s", record.request_id)

    def rejected(self, code: str) -> None:
        self._counters["errors", code].inc()
        if code in ADMISSION_CODES:
            self._counters["admission_rejections", code].inc()

    def render(self, openmetrics: bool = False) -> tuple[bytes, str]:
        """The body of /metrics and its content type. Takes milliseconds where several front ends share a directory."""
        source = _WithoutCreated(self._registry)
        if openmetrics:  # the default escaping would turn the colons of sample names into underscores
            return generate_openmetrics(source, escaping=ALLOWUTF8), CONTENT_TYPE_LATEST
        return generate_latest(source), CONTENT_TYPE_PLAIN_0_0_4

    def _first_token(self, assembler: RequestAssembler) -> None:
        metrics, num_prompt = assembler.metrics, len(assembler.request.prompt_token_ids)
        self._counters["prompt_tokens", ""].inc(num_prompt)
        self._counters["prompt_tokens_cached", ""].inc(metrics.cached_tokens)
        self._observe("request_prefill_kv_computed_tokens", num_prompt - metrics.cached_tokens)
        self._observe("time_to_first_token_seconds", metrics.time_to_first_token)

    def _count(self, record: RequestRecord) -> None:
        """Sizes of every request; durations of the phases it lived to see the end of."""
        unfinished = "abort" if record.error_code in ENDED_CODES else "error"
        for reason in record.finish_reasons:
            self._counters["request_success", reason or unfinished].inc()
        if record.error_code is not None:
            self._counters["errors", record.error_code].inc()
        self._observe("request_prompt_tokens", record.num_prompt_tokens)
        self._observe("request_generation_tokens", record.num_generated_tokens)
        self._observe("request_max_num_generation_tokens", record.max_generated_tokens)
        self._observe("request_params_n", record.n)
        self._observe("request_params_max_tokens", record.max_tokens)
        self._observe("request_num_preemptions", record.metrics.preemptions)
        self._observe("request_queue_time_seconds", record.metrics.queue_time)
        self._observe("request_prefill_time_seconds", record.prefill_time)
        if record.error_code is None:
            self._observe("e2e_request_latency_seconds", record.e2e_time)
            self._observe("request_inference_time_seconds", record.inference_time)
            self._observe("request_decode_time_seconds", record.decode_time)
            self._observe("request_time_per_output_token_seconds", record.metrics.time_per_output_token)

    def _observe(self, name: str, value: float | None) -> None:
        if value is not None:
            self._histograms[name].observe(value)


@dataclass
class _Open:
    """An accepted request that has not ended."""

    call: CallContext
    last_tokens: dict[int, float] = field(default_factory=dict)  # sample -> when its last token came


class _Instruments:
    """REQUEST_FAMILIES, every series made and its labels bound."""

    def __init__(self, prefix: str, label_values: tuple[str, str], registry: CollectorRegistry | None):
        self.counters: dict[tuple[str, str], Counter] = {}  # (family, value of its own label or "")
        self.histograms: dict[str, Histogram] = {}
        for family in REQUEST_FAMILIES:
            name = f"{prefix}:{family.name}"
            if family.kind == "gauge":
                gauge = Gauge(name, family.help, COMMON_LABELS, registry=registry, multiprocess_mode="livesum")
                self.open_requests = gauge.labels(*label_values)
            elif family.kind == "histogram":
                histogram = Histogram(name, family.help, COMMON_LABELS, registry=registry, buckets=family.buckets)
                self.histograms[family.name] = histogram.labels(*label_values)
            else:
                labels = (*COMMON_LABELS, family.label) if family.label else COMMON_LABELS
                counter = Counter(name, family.help, labels, registry=registry)
                for value in family.values or ("",):
                    own = (value,) if family.label else ()
                    self.counters[family.name, value] = counter.labels(*label_values, *own)


class _WithoutCreated(Collector):
    """A registry less the *_created series, which double the answer and which nobody reads."""

    def __init__(self, source: Collector):
        self._source = source

    def collect(self) -> Iterator[Metric]:
        for metric in self._source.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
