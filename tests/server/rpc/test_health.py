"""grpc.health.v1 says what the front end's own health says, now and whenever it changes."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from server.frontend.engine_client import EngineStatus
from server.rpc import health
from server.rpc.calls import SERVICE

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


@pytest.fixture
def checks(stub: Any) -> HealthStub:
    return HealthStub(stub.channel)


@pytest.fixture
def restarting(live: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    status = EngineStatus(phase="restarting", detail="it was killed – again")
    return lambda: monkeypatch.setattr(live.frontend.engine, "status", status, raising=False)


@pytest.mark.parametrize("service", ["", SERVICE])
def test_check_is_serving_while_ready(checks: HealthStub, service: str) -> None:
    assert checks.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING


@pytest.mark.parametrize("service", ["", SERVICE])
def test_check_is_not_serving_with_the_cause_otherwise(
    checks: HealthStub, restarting: Callable[[], None], service: str
) -> None:
    restarting()
    answer, call = checks.Check.with_call(health_pb2.HealthCheckRequest(service=service))
    assert answer.status == NOT_SERVING
    assert dict(call.trailing_metadata())["cause"] == "the engine is restarting: it was killed ? again"


def test_check_of_an_unknown_service_is_not_found(checks: HealthStub, refused: Any) -> None:
    refusal = refused(lambda: checks.Check(health_pb2.HealthCheckRequest(service="jaxserve.v2.Inference")))
    assert (refusal.status, "jaxserve.v2.Inference" in refusal.message) == ("NOT_FOUND", True)


def test_list_has_every_service(checks: HealthStub, restarting: Callable[[], None]) -> None:
    def listed() -> dict[str, int]:
        answer = checks.List(health_pb2.HealthListRequest())
        return {name: status.status for name, status in answer.statuses.items()}

    assert listed() == {"": SERVING, SERVICE: SERVING}
    restarting()
    assert listed() == {"": NOT_SERVING, SERVICE: NOT_SERVING}


@pytest.mark.parametrize("service", ["", SERVICE])
def test_watch_tells_changes_and_nothing_else(
    checks: HealthStub, live: Any, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    watch = checks.Watch(health_pb2.HealthCheckRequest(service=service))
    assert next(watch).status == SERVING
    with monkeypatch.context() as patch:
        patch.setattr(live.frontend.engine, "status", EngineStatus(phase="restarting"), raising=False)
        assert next(watch).status == NOT_SERVING
    assert next(watch).status == SERVING
    watch.cancel()


def test_watch_of_an_unknown_service_says_so_and_stays(checks: HealthStub) -> None:
    watch = checks.Watch(health_pb2.HealthCheckRequest(service="nobody"))
    assert next(watch).status == SERVICE_UNKNOWN
    assert watch.is_active()
    watch.cancel()


def test_drain_ends_watches_so_that_they_do_not_hold_it_up(start_front: Any, connect: Any, refused: Any) -> None:
    front = start_front()
    watch = HealthStub(connect(front.grpc).channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == SERVING
    front.frontend.begin_drain()
    assert next(watch).status == NOT_SERVING
    assert refused(lambda: next(watch)).status == "UNAVAILABLE"


def test_watches_are_bounded(checks: HealthStub, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MAX_WATCHERS", 2)
    watches = [checks.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
    assert [next(watch).status for watch in watches] == [SERVING, SERVING]
    refusal = refused(lambda: list(checks.Watch(health_pb2.HealthCheckRequest())))
    assert refusal.status == grpc.StatusCode.RESOURCE_EXHAUSTED.name
    assert checks.Check(health_pb2.HealthCheckRequest()).status == SERVING
    for watch in watches:
        watch.cancel()
