"""Logs on stderr, text or JSON, one line a record whatever it holds. Prompts and outputs are never in them.

In: records of the standard logging module (ours, uvicorn's, gRPC's, warnings), finished requests, the engine's status.
Out: lines. Fields of a record are given as `extra={"fields": {...}}`: JSON shows them, text does not.
"""

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from jaxserve.engine.stats import EngineStats
from server.frontend.engine_client import EngineStatus
from server.frontend.health import PROBE_AFTER
from server.observability.records import RequestRecord
from server.settings import ServerSettings

logger = logging.getLogger(__name__)

OURS = ("jaxserve", "pallas_kernels", "server")
FOREIGN = ("uvicorn", "uvicorn.error", "uvicorn.access", "grpc", "asyncio")  # some bring handlers of their own
POLL_SECONDS = 1.0  # while the engine has not described itself
MAX_MESSAGE = 16_384  # characters; what is longer was not written for people
# Control characters, line and paragraph separators, direction marks and lone surrogates: none may act on a reader.
_ACTING = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {
    **{code: f"\\u{code:04x}" for code in (*_ACTING, *range(0xD800, 0xE000))},
    **{ord(char): escape for char, escape in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t"))},
}


def configure_logging(settings: ServerSettings, process_name: str, stream: TextIO | None = None) -> None:
    """Sends every logger of this process through one handler. process_name: "frontend-0", "core", "supervisor".

    Our packages log from settings.log_level on; others only warnings, at debug level also what they do.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter((JsonFormatter if settings.log_format == "json" else TextFormatter)(process_name))
    root = logging.getLogger()
    for other in root.handlers[:]:
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(logging.INFO if settings.log_level == "debug" else logging.WARNING)
    for name in FOREIGN:
        foreign = logging.getLogger(name)
        foreign.handlers.clear()
        foreign.setLevel(logging.NOTSET)
        foreign.propagate = True
    for name in OURS:
        logging.getLogger(name).setLevel(settings.log_level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00.123 INFO frontend-0 server.rest.app: message`, in local time."""

    default_msec_format = "%s.%03d"

    def __init__(self, process_name: str):
        super().__init__(f"%(asctime)s %(levelname)s {process_name} %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return _one_line(super().format(record))


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC, ISO 8601), level, process, logger, message, exception, and the record's fields."""

    def __init__(self, process_name: str):
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process_name,
            "logger": record.name,
            "message": _capped(record.getMessage()),
        }
        if record.exc_info:
            entry["exception"] = _capped(self.formatException(record.exc_info))
        for name, value in getattr(record, "fields", {}).items():
            entry.setdefault(name, value)
        return json.dumps(entry, default=str)  # ASCII: every character that could act is escaped


class RequestLog:
    """Listens to finished requests: one line each, at debug level in text, at info level in JSON (for machines)."""

    def __init__(self, settings: ServerSettings):
        self._level = logging.INFO if settings.log_format == "json" else logging.DEBUG

    def __call__(self, record: RequestRecord) -> None:
        if not logger.isEnabledFor(self._level):
            return
        logger.log(
            self._level,
            "request %s (%s) %s: %s, %d prompt tokens (%d cached), %d generated, first token after %s, %.3f s in all",
            record.request_id,
            record.client_request_id,
            record.endpoint,
            record.error_code or "/".join(record.finish_reasons),
            record.num_prompt_tokens,
            record.num_cached_tokens,
            record.num_generated_tokens,
            _seconds(record.metrics.time_to_first_token),
            record.e2e_time,
            extra={"fields": request_fields(record)},
        )


class IntervalLog:
    """One line every settings.log_interval seconds in which the engine had something to do; at debug level otherwise.

    One front end writes it, for the whole engine.
    """

    def __init__(
        self,
        settings: ServerSettings,
        status: Callable[[], EngineStatus],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._interval = settings.log_interval
        self._status = status
        self._clock = clock
        self._last: EngineStats | None = None
        self._last_time = clock()

    async def run(self) -> None:
        """Until cancelled."""
        while self._last is None:  # counts begin where they are when the engine is first heard
            await asyncio.sleep(min(POLL_SECONDS, self._interval))
            self.tick()
        while True:
            await asyncio.sleep(self._interval)
            self.tick()

    def tick(self) -> None:
        """Logs what happened since the last tick; nothing at the first that finds an engine: it may be an old one."""
        now, status, before = self._clock(), self._status(), self._last
        stats = status.stats
        if stats is None or status.phase != "ready":
            return
        seconds = max(now - self._last_time, 1e-9)
        self._last, self._last_time = stats, now
        if before is None:
            return
        if stats.steps < before.steps:  # a new engine process counts from 0
            prompt, generated, preemptions = stats.prompt_tokens, stats.generated_tokens, stats.preemptions
        else:
            prompt = stats.prompt_tokens - before.prompt_tokens
            generated = stats.generated_tokens - before.generated_tokens
            preemptions = stats.preemptions - before.preemptions
        fields = {
            "prompt_tokens_per_second": round(prompt / seconds, 1),
            "generated_tokens_per_second": round(generated / seconds, 1),
            "running": stats.running,
            "waiting": stats.waiting,
            "preemptions": preemptions,
            "kv_cache_usage": round(stats.pages_used / max(1, stats.pages_total), 4),
            "prefix_cache_hit_rate": round(stats.prefix_cache_hit_rate, 4),
        }
        probes = 1 + seconds // PROBE_AFTER  # an idle server asks itself for a token now and then
        busy = stats.running or stats.waiting or prompt > probes or generated > probes
        logger.log(
            logging.INFO if busy else logging.DEBUG,
            "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, Running: %d reqs, "
            "Waiting: %d reqs, %sKV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
            prompt / seconds,
            generated / seconds,
            stats.running,
            stats.waiting,
            f"Preemptions: {preemptions}, " if preemptions else "",
            100 * stats.pages_used / max(1, stats.pages_total),
            100 * stats.prefix_cache_hit_rate,
            extra={"fields": fields},
        )


def request_fields(record: RequestRecord) -> dict[str, Any]:
    """A record as JSON can carry it; durations are seconds."""
    metrics = record.metrics
    durations = {
        "queue_time": metrics.queue_time,
        "prefill_time": record.prefill_time,
        "decode_time": record.decode_time,
        "time_to_first_token": metrics.time_to_first_token,
        "time_per_output_token": metrics.time_per_output_token,
        "e2e_time": record.e2e_time,
    }
    return {
        "request_id": record.request_id,
        "client_request_id": record.client_request_id,
        "endpoint": record.endpoint,
        "model": record.model,
        "finish_reasons": list(record.finish_reasons),
        "error_code": record.error_code,
        "n": record.n,
        "max_tokens": record.max_tokens,
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "generated_tokens": record.num_generated_tokens,
        "preemptions": metrics.preemptions,
        **{name: None if value is None else round(value, 6) for name, value in durations.items()},
    }


def _one_line(text: str) -> str:
    return _capped(text).translate(_ESCAPES)


def _capped(text: str) -> str:
    if len(text) <= MAX_MESSAGE:
        return text
    return f"{text[:MAX_MESSAGE]}... ({len(text) - MAX_MESSAGE} characters more)"


def _seconds(value: float | None) -> str:
    return "no time" if value is None else f"{value:.3f} s"


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    logger.critical("uncaught %s", kind.__name__, exc_info=(kind, error, trace))
