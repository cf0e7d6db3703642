"""What the engine last said of itself, as Prometheus families: read at every scrape, kept nowhere."""

import time
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from jaxserve.engine.stats import STEP_TOKEN_BOUNDS, EngineStats
from server.frontend.engine_client import EngineInfo, EngineStatus
from server.observability.catalog import CACHE_CONFIG_LABELS, COMMON_LABELS, ENGINE_FAMILIES, Family

NO_ENGINE = ("restarting", "dead")  # phases in which nothing runs, whatever was heard last


class EngineCollector(Collector):
    """ENGINE_FAMILIES with the prefix and the values of COMMON_LABELS given.

    What the engine has not told yet is left out: a counter shown as 0 by a front end that has just come would look like
    a reset to who asked another one before. Counters do start over with a new engine process.
    """

    def __init__(
        self,
        prefix: str,
        label_values: tuple[str, str],
        status: Callable[[], EngineStatus],
        info: Callable[[], EngineInfo | None],
        ready: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._prefix = prefix
        self._label_values = label_values
        self._status = status
        self._info = info
        self._ready = ready
        self._clock = clock
        self._start = clock()

    def collect(self) -> Iterator[Metric]:
        """Safe to call from any thread."""
        status, info, now = self._status(), self._info(), self._clock()
        values = _values(status, now - (status.heard or self._start), now)
        values["server_ready"] = float(self._ready())
        for family in ENGINE_FAMILIES:
            if family.name == "cache_config_info":
                if info is not None:
                    yield self._cache_config(family, info)
            elif family.name == "engine_phase":
                yield self._phases(family, status.phase)
            elif family.kind == "histogram":
                if status.stats is not None:
                    yield self._step_tokens(family, status.stats)
            elif family.name in values:
                kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
                metric = kind(self._name(family), family.help, labels=COMMON_LABELS)
                metric.add_metric(self._label_values, values[family.name])
                yield metric

    def _name(self, family: Family) -> str:
        return f"{self._prefix}:{family.name}"

    def _phases(self, family: Family, current: str) -> Metric:
        assert family.label is not None
        gauge = GaugeMetricFamily(self._name(family), family.help, labels=(*COMMON_LABELS, family.label))
        for phase in family.values:
            gauge.add_metric((*self._label_values, phase), float(phase == current))
        return gauge

    def _step_tokens(self, family: Family, stats: EngineStats) -> Metric:
        bounds = [*map(floatToGoString, STEP_TOKEN_BOUNDS), "+Inf"]
        totals = map(float, accumulate(stats.step_token_buckets))
        histogram = HistogramMetricFamily(self._name(family), family.help, labels=COMMON_LABELS)
        buckets = list(zip(bounds, totals, strict=True))
        histogram.add_metric(self._label_values, buckets, sum_value=float(stats.computed_tokens))
        return histogram

    def _cache_config(self, family: Family, info: EngineInfo) -> Metric:
        """Labels as vLLM spells them where it has them: routers read block_size and num_gpu_blocks."""
        limits = info.limits
        values = {
            "block_size": limits.page_size,
            "num_gpu_blocks": limits.num_pages - 1,  # the waste page holds nobody's tokens
            "max_num_seqs": limits.max_num_seqs,
            "max_num_batched_tokens": limits.max_num_batched_tokens,
            "max_model_len": limits.max_model_len,
            "dtype": info.dtype,
        }
        gauge = GaugeMetricFamily(self._name(family), family.help, labels=(*COMMON_LABELS, *CACHE_CONFIG_LABELS))
        gauge.add_metric((*self._label_values, *(str(values[name]) for name in CACHE_CONFIG_LABELS)), 1.0)
        return gauge


def _values(status: EngineStatus, heartbeat_age: float, now: float) -> dict[str, float]:
    """By family, of those that have one value."""
    values: dict[str, float] = {
        "engine_restarts": status.restarts,
        "engine_up": float(status.phase == "ready"),
        "engine_heartbeat_age_seconds": max(0.0, heartbeat_age),
        "engine_step_age_seconds": max(0.0, now - status.step_started) if status.step_started is not None else 0.0,
    }
    stats = status.stats
    if stats is None:
        return values
    here = status.phase not in NO_ENGINE
    return values | {
        "num_requests_running": here * stats.running,
        "num_requests_waiting": here * stats.waiting,
        "num_slots": stats.max_num_seqs,
        "kv_cache_usage_perc": here * stats.pages_used / stats.pages_total,
        "prefix_cache_usage_perc": here * stats.pages_cached / stats.pages_total,
        "prefix_cache_queries": stats.prefix_query_tokens,
        "prefix_cache_hits": stats.prefix_hit_tokens,
        "num_preemptions": stats.preemptions,
        "engine_device_failures": stats.device_failures,
    }
