"""However a call ends, its client is told why and nothing of it is left."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from jaxserve.v1 import inference_pb2 as pb
from jaxserve.v1.inference_pb2_grpc import InferenceStub
from server.frontend.engine_client import EngineStatus

ENDLESS = pb.SamplingParams(ignore_eos=True, n=4)  # up to the context
ONE = pb.SamplingParams(max_tokens=1)
UNARY = pb.GenerateRequest(text="The quick", sampling=ENDLESS)
STREAM = pb.GenerateStreamRequest(text="The quick", sampling=ENDLESS)


@pytest.fixture(autouse=True)
def nothing_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What clients do is no error of the server's."""
    yield
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_deadline_ends_a_unary_call(stub: InferenceStub, slow: Any, refused: Any) -> None:
    assert refused(lambda: stub.Generate(UNARY, timeout=0.5)).status == "DEADLINE_EXCEEDED"
    slow.assert_ended_early()


def test_deadline_ends_a_stream(stub: InferenceStub, slow: Any, refused: Any) -> None:
    assert refused(lambda: stub.GenerateStream(STREAM, timeout=0.5)).status == "DEADLINE_EXCEEDED"
    slow.assert_ended_early()


def test_deadline_is_known_to_the_scheduler(
    stub: InferenceStub, live: Any, slow: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = []
    submit = live.frontend.engine.submit
    monkeypatch.setattr(
        live.frontend.engine,
        "submit",
        lambda requests, sink: (submitted.extend(requests), submit(requests, sink)),
        raising=False,
    )
    refused(lambda: stub.Generate(UNARY, timeout=0.5))
    [request] = submitted
    assert 0 < request.deadline - request.arrival_time <= 0.5
    slow.assert_ended_early()


def test_servers_own_deadline_is_told_after_what_was_generated(
    live: Any, slow: Any, start_live: Callable[..., Any], connect: Any, refused: Any
) -> None:
    limited = start_live(default_timeout=0.5)
    stub = connect(limited.grpc)
    refusal = refused(lambda: stub.Generate(UNARY))
    assert (refusal.status, refusal.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
    stream = stub.GenerateStream(STREAM)
    assert next(stream).choices
    assert refused(lambda: list(stream)).reason == "DEADLINE_EXCEEDED"
    limited.assert_idle()
    slow.assert_ended_early()


def test_cancelled_stream_is_freed(stub: InferenceStub, slow: Any, refused: Any) -> None:
    stream = stub.GenerateStream(STREAM)
    next(stream)
    stream.cancel()
    assert refused(lambda: list(stream)).status == "CANCELLED"
    slow.assert_ended_early()


def test_cancelled_unary_call_is_freed(stub: InferenceStub, live: Any, slow: Any) -> None:
    call = stub.Generate.future(UNARY)
    live.until(lambda: live.frontend.engine.status.open_samples)
    call.cancel()
    slow.assert_ended_early()


def test_client_that_vanishes_is_freed(live: Any, slow: Any) -> None:
    channel = grpc.insecure_channel(live.grpc)
    running = InferenceStub(channel).GenerateStream(STREAM)  # takes all four slots
    next(running)
    waiting = [InferenceStub(channel).GenerateStream(STREAM) for _ in range(2)]
    live.until(lambda: len(live.frontend.open_calls) == 3)
    channel.close()
    slow.assert_ended_early()
    assert not any(call.is_active() for call in (running, *waiting))


def test_calls_cancelled_at_any_stage_leave_nothing(live: Any) -> None:
    async def one(stub: Any, delay: float) -> None:
        kinds = [(stub.GenerateStream, STREAM), (stub.Generate, UNARY)]
        method, message = kinds[int(delay * 1e6) % 2]
        call = method(message)
        await asyncio.sleep(delay)
        call.cancel()

    async def storm() -> None:
        async with grpc.aio.insecure_channel(live.grpc) as channel:
            delays = random.Random(0)
            await asyncio.gather(*(one(InferenceStub(channel), delays.uniform(0, 0.2)) for _ in range(100)))

    asyncio.run(storm())
    live.assert_idle()


def test_reader_that_stops_is_dropped(start_live: Callable[..., Any]) -> None:
    live = start_live(slow_reader_timeout=0.5)
    # Prompt logprobs make the answer larger than the window of a client that is told not to widen it.
    sampling = pb.SamplingParams(ignore_eos=True, n=4, logprobs=20, prompt_logprobs=20)
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]

    async def stall() -> tuple[grpc.StatusCode, str]:
        async with grpc.aio.insecure_channel(live.grpc, options) as channel:
            call = InferenceStub(channel).GenerateStream(pb.GenerateStreamRequest(text="The", sampling=sampling))
            await call.read()
            await asyncio.to_thread(live.assert_idle)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                while await call.read() is not grpc.aio.EOF:
                    pass
            return raised.value.code(), raised.value.details()

    code, details = asyncio.run(stall())
    assert code is grpc.StatusCode.CANCELLED
    assert "0.5 s" in details


def test_draining_server_finishes_what_runs_and_refuses_what_is_new(
    start_front: Callable[..., Any], connect: Any, refused: Any
) -> None:
    live = start_front()
    stub = connect(live.grpc)
    stream = stub.GenerateStream(STREAM)
    pieces = [next(stream)]
    live.frontend.begin_drain()
    for call in (lambda: stub.Generate(UNARY), lambda: stub.GenerateStream(STREAM)):
        refusal = refused(call)
        assert (refusal.status, refusal.reason) == ("UNAVAILABLE", "DRAINING")
        assert refusal.retry_after is not None
    pieces += stream
    assert pieces[-1].usage.completion_tokens == 4 * (256 - pieces[-1].usage.prompt_tokens)
    live.assert_idle()


def test_streams_that_outlast_the_drain_are_told_so(
    live: Any, slow: Any, start_front: Callable[..., Any], connect: Any, refused: Any
) -> None:
    front = start_front()
    stream = connect(front.grpc).GenerateStream(STREAM)
    next(stream)
    front.frontend.begin_drain()
    front.call(lambda: front.frontend.drained(0.1))
    assert refused(lambda: list(stream)).reason == "DRAINING"
    front.assert_idle()
    slow.assert_ended_early()


@pytest.mark.parametrize("phase", ["loading", "restarting"])
def test_engine_that_is_not_ready_is_told_with_its_phase(
    live: Any, stub: InferenceStub, refused: Any, monkeypatch: pytest.MonkeyPatch, phase: Any
) -> None:
    monkeypatch.setattr(live.frontend.engine, "status", EngineStatus(phase=phase, detail="3 of 11"), raising=False)
    refusal = refused(lambda: stub.GenerateStream(STREAM))
    assert (refusal.status, refusal.reason) == ("UNAVAILABLE", "NOT_READY")
    assert phase in refusal.message and "3 of 11" in refusal.message
    assert refusal.retry_after is not None


def test_full_queue_is_told_with_a_time_to_come_back(
    live: Any, slow: Any, start_live: Callable[..., Any], connect: Any, refused: Any
) -> None:
    small = start_live(max_num_queued_reqs=0)
    stub = connect(small.grpc)
    stream = stub.GenerateStream(STREAM)  # takes all four slots
    next(stream)
    refusal = refused(lambda: stub.Generate(pb.GenerateRequest(text="a", sampling=ONE)))
    assert (refusal.status, refusal.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert refusal.retry_after is not None
    stream.cancel()
    small.assert_idle()
    assert stub.Generate(pb.GenerateRequest(text="a", sampling=ONE)).usage.completion_tokens == 1


def test_calls_beyond_the_bound_are_refused_while_health_answers(
    live: Any, slow: Any, start_live: Callable[..., Any], connect: Any, refused: Any
) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    small = start_live(max_connections=2)
    stub = connect(small.grpc)
    streams = [stub.GenerateStream(STREAM) for _ in range(2)]
    small.until(lambda: len(small.frontend.open_calls) == 2)
    refusal = refused(lambda: stub.ListModels(pb.ListModelsRequest()))
    assert (refusal.status, refusal.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    health = health_pb2_grpc.HealthStub(stub.channel)
    assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    for stream in streams:
        stream.cancel()
    small.assert_idle()
    assert stub.ListModels(pb.ListModelsRequest()).models
