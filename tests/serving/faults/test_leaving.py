"""Clients that leave, at every stage and by the hundred, by disconnect, reset, cancel or deadline: all is freed."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from jaxserve.v1 import inference_pb2 as pb
from jaxserve.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}
WAVE = 20  # clients killed at the same moment; fewer than the server has slots


def test_a_client_may_leave_at_any_stage(keyed: Any, wire_to: Callable[[Any], Any], golden_beside: Any) -> None:
    """32: in its headers, its body, the queue, the prefill, the stream, at the end; by HTTP and gRPC. No traceback."""
    wire = wire_to(keyed)
    key = f"Authorization: Bearer {keyed.key}"
    stages = {
        "prefill": {"prompt": [100] * 700, "max_tokens": 5},
        "stream": LONG | {"stream": True},
        "whole": LONG,
        "several": LONG | {"n": 4, "stream": True},
        "template": {"messages": [{"role": "user", "content": "loop"}]},
    }
    whole = wire.request(json.dumps(LONG).encode(), key)
    metadata = tuple(keyed.headers.items())
    with golden_beside(keyed):
        for part in (b"", whole[:20], whole[: whole.index(b"\r\n\r\n") + 2], whole[:-5], whole):
            leave(keyed, part, after=0.0)
        for body in stages.values():
            route = CHAT if "messages" in body else COMPLETIONS
            for after in (0.0, 0.1, 0.4):
                leave(keyed, wire.request(json.dumps(body).encode(), key, route=route), after)
        filling = keyed.events(COMPLETIONS, LONG | {"n": 7})
        next(filling)
        leave(keyed, whole, after=0.2)  # it waited for a slot
        for after in (0.0, 0.05, 0.3):
            call = wire.stub.GenerateStream(pb.GenerateStreamRequest(text="Once"), metadata=metadata)
            time.sleep(after)
            call.cancel()
        filling.close()
        for reset in (False, True):
            for events in range(1, 4):
                leave(keyed, wire.request(json.dumps(LONG | {"stream": True}).encode(), key), 0.0, events, reset)
        keyed.until(lambda: keyed.metric("open_requests") <= 1, "only the golden stream is open")
    keyed.assert_idle()


def leave(server: Any, sent: bytes, after: float, events: int = 0, reset: bool = False) -> None:
    """Sends bytes, reads so many events, waits, and closes; reset: so that the server sees an error, not an end."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as sock:
        sock.sendall(sent)
        received = b""
        while received.count(b"data: ") < events:
            received += sock.recv(65536)
        time.sleep(after)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


def test_two_hundred_clients_killed_in_mid_stream_leave_nothing(
    server: Any, wire: Any, golden_beside: Callable[..., Any]
) -> None:
    """32: each has its first token, and then resets its connection together with the others of its wave."""

    async def one(number: int, wave: asyncio.Barrier) -> None:
        body = {**LONG, "prompt": f"Tell me about {number}", "stream": True}
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(wire.request(json.dumps(body).encode()))
        while b"data: " not in (received := await reader.read(65536)):
            assert received, "it was refused"
        await wave.wait()
        writer.transport.abort()

    async def all_of_them() -> None:
        for first in range(0, 200, WAVE):
            wave = asyncio.Barrier(WAVE)
            await asyncio.gather(*(one(number, wave) for number in range(first, first + WAVE)))

    with golden_beside(server):
        asyncio.run(all_of_them())
        for gauge, left in (("open_requests", 1), ("num_requests_running", 1), ("num_requests_waiting", 0)):
            server.until(lambda gauge=gauge, left=left: server.metric(gauge) <= left, f"{gauge} is {left} again")
    server.assert_idle()
    assert server.status()["engine"]["stats"]["pages_used"] == 0


def test_a_disconnect_frees_the_samples_within_two_steps(server: Any) -> None:
    """32: counted in tokens: what the engine generated, less what the front end took for somebody who was there."""

    def generated_for_nobody() -> float:
        """Once the engine is idle and has said so twice."""
        for _ in range(2):
            heard = server.status()["engine"]["heard"]
            server.until(lambda heard=heard: server.status()["engine"]["heard"] > heard, "the engine is heard")
            server.assert_idle()
        return server.status()["engine"]["stats"]["generated_tokens"] - server.metric("generation_tokens_total")

    samples, victims = 4, 8
    before = generated_for_nobody()
    for _ in range(victims):
        victim = server.events(COMPLETIONS, LONG | {"n": samples})
        for _ in range(5):
            next(victim)
        victim.close()
        server.until(lambda: not server.status()["engine"]["open_samples"], "its samples are gone")
    steps = (generated_for_nobody() - before) / samples / victims
    print(f"{steps:.2f} steps were made for a client that was gone")
    assert 0 <= steps <= 2


def test_deadlines_of_both_protocols_free_their_pages(server: Any) -> None:
    stub = InferenceStub(grpc.insecure_channel(server.grpc))
    body = LONG | {"max_tokens": 4000, "n": 4}
    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(server.post, COMPLETIONS, body, {"X-Request-Timeout": "1"}) for _ in range(4)]
        message = pb.GenerateRequest(text="Once", sampling=pb.SamplingParams(n=4, ignore_eos=True))
        calls = [stub.Generate.future(message, timeout=1) for _ in range(4)]
        assert {answer.result().status_code for answer in answers} == {504}
        assert {call.code() for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    server.assert_idle()
