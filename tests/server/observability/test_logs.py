"""Whatever is logged is one line; idle servers are silent; requests leave counts and timings, never text."""

import asyncio
import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.stats import EngineStats
from server.frontend.engine_client import EngineStatus
from server.observability.logs import IntervalLog, JsonFormatter, RequestLog, TextFormatter, configure_logging
from server.observability.metrics import ServerMetrics
from server.settings import ServerSettings

ROOT = Path(__file__).parents[3]
NASTY = "one\ntwo\r\n2026-01-01 00:00:00.000 INFO core server: forged\x1b[2J\x00\x85\u2028\u202e\ud800\tend"


@pytest.fixture
def logged() -> Iterator[Callable[..., io.StringIO]]:
    """logged(**settings): the stream all logs go to from now on, in a process called "frontend-0"."""
    names = ("", "jaxserve", "pallas_kernels", "server", "uvicorn", "uvicorn.error", "uvicorn.access", "asyncio")
    loggers = [logging.getLogger(name) for name in names]
    before = [(one, one.handlers[:], one.level, one.propagate) for one in loggers]
    hook = sys.excepthook

    def configure(**settings: Any) -> io.StringIO:
        stream = io.StringIO()
        configure_logging(ServerSettings(**settings), "frontend-0", stream)
        return stream

    yield configure
    logging.captureWarnings(False)
    sys.excepthook = hook
    for one, handlers, level, propagate in before:
        one.handlers[:], one.level, one.propagate = handlers, level, propagate
        one.setLevel(level)


def record_of(message: str, *args: object, **given: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "server.x", "levelname": "INFO", "msg": message, "args": args, **given})


@pytest.mark.parametrize("formatter", [TextFormatter("core"), JsonFormatter("core")])
@given(text=st.text(st.characters(blacklist_categories=())))
def test_any_message_is_one_line_of_printable_characters(formatter: logging.Formatter, text: str) -> None:
    line = formatter.format(record_of("got %s", text + NASTY))
    assert len(line.splitlines()) == 1
    assert not any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 or char in "\u202e\u2028" for char in line)
    line.encode()  # no lone surrogate is left


@pytest.mark.parametrize("formatter", [TextFormatter("core"), JsonFormatter("core")])
def test_a_traceback_is_on_the_same_line(formatter: logging.Formatter) -> None:
    try:
        raise ValueError(NASTY)
    except ValueError:
        line = formatter.format(record_of("failed", exc_info=sys.exc_info()))
    assert len(line.splitlines()) == 1
    assert "Traceback" in line and "ValueError" in line and "forged" in line


@pytest.mark.parametrize("formatter", [TextFormatter("core"), JsonFormatter("core")])
def test_a_huge_message_is_cut_and_says_so(formatter: logging.Formatter) -> None:
    line = formatter.format(record_of("x" * 10**6))
    assert len(line) < 20_000
    assert "characters more" in line


def test_text_names_time_level_process_and_logger(logged: Callable[..., io.StringIO]) -> None:
    stream = logged()
    logging.getLogger("server.rest").warning("slow %s", "reader")
    date, time, rest = stream.getvalue().split(" ", 2)
    assert (len(date), len(time)) == (len("2026-01-31"), len("12:00:00.123"))
    assert rest == "WARNING frontend-0 server.rest: slow reader\n"


def test_json_carries_fields_and_none_of_them_can_pose_as_another(logged: Callable[..., io.StringIO]) -> None:
    stream = logged(log_format="json")
    logging.getLogger("server.rest").info("hello", extra={"fields": {"status": 429, "level": "forged"}})
    entry = json.loads(stream.getvalue())
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "info",
        "process": "frontend-0",
        "logger": "server.rest",
        "message": "hello",
        "status": 429,
    }


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", {"ours debug", "ours info", "ours error", "foreign info", "foreign warning"}),
        ("info", {"ours info", "ours error", "foreign warning"}),
        ("error", {"ours error", "foreign warning"}),
    ],
)
def test_the_level_is_ours_and_others_are_quieter(
    level: str, shown: set[str], logged: Callable[..., io.StringIO]
) -> None:
    stream = logged(log_level=level, log_format="json")
    for severity in ("debug", "info", "error"):
        getattr(logging.getLogger("jaxserve.engine"), severity)("ours %s", severity)
    for severity in ("debug", "info", "warning"):
        getattr(logging.getLogger("uvicorn.access"), severity)("foreign %s", severity)
    assert {json.loads(line)["message"] for line in stream.getvalue().splitlines()} == shown


def test_warnings_and_loggers_that_brought_their_own_handler_go_the_same_way(
    logged: Callable[..., io.StringIO],
) -> None:
    elsewhere = io.StringIO()
    uvicorn = logging.getLogger("uvicorn")
    uvicorn.addHandler(logging.StreamHandler(elsewhere))
    uvicorn.propagate = False
    stream = logged()
    logging.getLogger("uvicorn.error").error("from uvicorn")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("from warnings", UserWarning, stacklevel=1)
    assert "from uvicorn" in stream.getvalue() and "from warnings" in stream.getvalue()
    assert elsewhere.getvalue() == ""
    assert len(stream.getvalue().splitlines()) == 2


def test_an_uncaught_error_is_one_line_too() -> None:
    script = (
        "from server.observability.logs import configure_logging\nfrom server.settings import ServerSettings\n"
        "configure_logging(ServerSettings(log_format='json'), 'core')\nraise RuntimeError('a\\nb')"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    entry = json.loads(line)
    assert entry["level"] == "critical" and "RuntimeError: a\nb" in entry["exception"]


def test_a_finished_request_is_a_line_of_counts_and_times_for_machines(
    make_metrics: Callable[..., ServerMetrics], drive: Any, logged: Callable[..., io.StringIO]
) -> None:
    stream = logged(log_format="json")
    metrics = make_metrics()
    metrics.listen(RequestLog(ServerSettings(log_format="json")))
    drive(metrics).run()
    entry = json.loads(stream.getvalue())
    expected = {
        "client_request_id": "client-1",
        "endpoint": "/v1/completions",
        "model": "tiny",
        "finish_reasons": ["length"],
        "error_code": None,
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "generated_tokens": 3,
        "queue_time": 0.25,
        "time_to_first_token": 0.5,
        "time_per_output_token": 0.5,
        "e2e_time": 1.5,
    }
    assert {name: entry[name] for name in expected} == expected


def test_a_client_id_cannot_forge_a_line(
    make_metrics: Callable[..., ServerMetrics], drive: Any, call: Any, logged: Callable[..., io.StringIO]
) -> None:
    stream = logged(log_level="debug")
    metrics = make_metrics()
    metrics.listen(RequestLog(ServerSettings(log_level="debug")))
    driver = drive(metrics)
    driver.finish(driver.begin(call=call(client_request_id=NASTY)), 3.0, "engine_dead")
    [line] = stream.getvalue().splitlines()
    assert "engine_dead" in line and "first token after no time" in line


def test_text_logs_show_requests_only_at_debug_level(
    make_metrics: Callable[..., ServerMetrics], drive: Any, logged: Callable[..., io.StringIO]
) -> None:
    stream = logged()
    metrics = make_metrics()
    metrics.listen(RequestLog(ServerSettings()))
    drive(metrics).run()
    assert stream.getvalue() == ""


class Ticking:
    """An IntervalLog whose clock stands at `now`."""

    def __init__(self, engine: Any):
        self.now = 0.0
        self.log = IntervalLog(ServerSettings(log_level="debug"), lambda: engine.status, lambda: self.now)

    def at(self, now: float) -> None:
        self.now = now
        self.log.tick()


def test_the_interval_line_has_rates_of_the_interval(
    engine: Any, make_stats: Callable[..., EngineStats], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ticking = Ticking(engine)
    ticking.at(10)  # nothing heard yet
    engine.status = EngineStatus(phase="ready", stats=make_stats(prompt_tokens=5000, generated_tokens=7000))
    ticking.at(20)  # an engine that has worked before this front end came
    assert caplog.messages == []
    later = make_stats(prompt_tokens=5050, generated_tokens=7300, preemptions=4, steps=20)
    engine.status = EngineStatus(phase="ready", stats=later)
    ticking.at(30)
    [record] = caplog.records
    assert record.levelname == "INFO"
    assert record.message == (
        "Avg prompt throughput: 5.0 tokens/s, Avg generation throughput: 30.0 tokens/s, Running: 3 reqs, "
        "Waiting: 5 reqs, Preemptions: 2, KV cache usage: 25.0%, Prefix cache hit rate: 25.0%"
    )
    fields = vars(record)["fields"]
    assert (fields["prompt_tokens_per_second"], fields["kv_cache_usage"]) == (5.0, 0.25)


@pytest.mark.parametrize(
    ("more", "level"),
    [
        ({}, "DEBUG"),
        ({"prompt_tokens": 1, "generated_tokens": 1}, "DEBUG"),  # a probe
        ({"prompt_tokens": 3}, "INFO"),
        ({"generated_tokens": 3}, "INFO"),
        ({"running": 1}, "INFO"),
        ({"waiting": 1}, "INFO"),
    ],
)
def test_an_idle_engine_is_silent_but_for_debug(
    more: dict[str, int], level: str, engine: Any, make_stats: Callable[..., EngineStats], caplog: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    ticking = Ticking(engine)
    idle = {"running": 0, "waiting": 0, "prompt_tokens": 0, "generated_tokens": 0}
    engine.status = EngineStatus(phase="ready", stats=make_stats(**idle))
    ticking.at(10)
    engine.status = EngineStatus(phase="ready", stats=make_stats(**idle | more))
    ticking.at(20)
    [record] = caplog.records
    assert record.levelname == level
    assert "Preemptions" not in record.message


def test_rates_are_right_and_not_negative_after_the_engine_started_anew(
    engine: Any, make_stats: Callable[..., EngineStats], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ticking = Ticking(engine)
    stats = make_stats()
    engine.status = EngineStatus(phase="ready", stats=stats)
    ticking.at(10)
    engine.status = EngineStatus(phase="restarting", stats=stats)
    ticking.at(15)  # nothing runs in it, whatever was heard last
    engine.status = EngineStatus(phase="ready", stats=replace(stats, steps=2, prompt_tokens=40, generated_tokens=20))
    ticking.at(20)
    assert caplog.messages[0].startswith("Avg prompt throughput: 4.0 tokens/s, Avg generation throughput: 2.0 tokens/s")


def test_the_interval_line_is_written_every_interval_until_cancelled(
    engine: Any, make_stats: Callable[..., EngineStats], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def until_two_lines() -> None:
        task = asyncio.create_task(IntervalLog(ServerSettings(log_interval=0.01), lambda: engine.status).run())
        await asyncio.sleep(0.05)
        assert not caplog.records  # the engine has not described itself
        engine.status = EngineStatus(phase="ready", stats=make_stats())
        while len(caplog.records) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(until_two_lines())
