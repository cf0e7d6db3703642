"""Health says what is, and why: each way an engine can be unwell has a cause of its own."""

import time
from dataclasses import replace

import pytest

from server.frontend import health
from server.frontend.engine_client import EngineStatus
from server.frontend.health import Health


class Engine:
    def __init__(self) -> None:
        now = time.monotonic()
        self.status = EngineStatus(phase="ready", heard=now, last_output=now)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def draining() -> list[bool]:
    return [False]


@pytest.fixture
def checked(engine: Engine, draining: list[bool]) -> Health:
    return Health(engine, lambda: draining[0], lambda: True)


def test_engine_that_speaks_and_generates_is_live_and_ready(checked):
    assert checked.live().ok and checked.ready().ok
    assert checked.ready().cause is None and checked.ready().details["phase"] == "ready"


def test_front_end_without_its_tokenizer_is_live_but_not_ready(engine):
    unprepared = Health(engine, lambda: False, lambda: False)
    assert unprepared.live().ok
    assert not unprepared.ready().ok and "tokenizer" in unprepared.ready().cause


@pytest.mark.parametrize("phase", ["starting", "planning", "loading", "compiling", "restarting"])
def test_engine_on_its_way_is_live_but_not_ready_and_says_how_far_it_is(engine, checked, phase):
    engine.status = replace(engine.status, phase=phase, detail="5 of 11", heard=0.0)
    assert checked.live().ok
    assert not checked.ready().ok and phase in checked.ready().cause and "5 of 11" in checked.ready().cause


def test_silent_engine_process_is_not_ready_and_later_not_live(engine, checked):
    now = time.monotonic()
    engine.status = replace(engine.status, heard=now - health.HEARD_WITHIN - 1)
    assert not checked.ready().ok and "said nothing" in checked.ready().cause
    assert checked.live().ok
    engine.status = replace(engine.status, heard=now - health.HEARD_WITHIN * health.LIVE_FACTOR - 1)
    assert not checked.live().ok and "said nothing" in checked.live().cause


def test_step_that_does_not_end_is_named(engine, checked):
    now = time.monotonic()
    engine.status = replace(engine.status, step_started=now - health.STEP_WITHIN - 1)
    assert not checked.ready().ok and "one step" in checked.ready().cause
    assert checked.ready().details["step_age_seconds"] > health.STEP_WITHIN
    engine.status = replace(engine.status, step_started=now - 1)
    assert checked.ready().ok


def test_engine_without_a_recent_token_is_not_ready(engine, checked):
    engine.status = replace(engine.status, last_output=time.monotonic() - health.TOKEN_WITHIN - 1)
    assert not checked.ready().ok and "no token" in checked.ready().cause
    engine.status = replace(engine.status, last_output=None)
    assert not checked.ready().ok and "not produced a token" in checked.ready().cause
    assert checked.live().ok


def test_draining_server_is_live_and_not_ready(checked, draining):
    draining[0] = True
    assert checked.live().ok
    assert not checked.ready().ok and "draining" in checked.ready().cause


def test_dead_engine_is_neither(engine, checked):
    engine.status = replace(engine.status, phase="dead", detail="3 failed restarts")
    for report in (checked.live(), checked.ready()):
        assert not report.ok and "3 failed restarts" in report.cause
