"""The core's door: whatever becomes of a front end, nothing of it is left in the engine and no other one notices."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from jaxserve.internal.v1 import tokens_pb2 as pb
from jaxserve.internal.v1.tokens_pb2_grpc import TokenStreamStub, add_TokenStreamServicer_to_server
from jaxserve.request import Request, SamplingParams
from server.core import service
from server.core.service import CoreState, TokenStreamService
from server.core.start import engine_info
from server.core.wire import request_to_wire

LONG = SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True)


def submit(name: str, params: SamplingParams = LONG) -> pb.ConnectRequest:
    now = time.monotonic()
    request = Request(id=name, prompt_token_ids=[5, 6, 7], params=params, arrival_time=now)
    return pb.ConnectRequest(submit=pb.Submit(requests=[request_to_wire(request, now)]))


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.005)


class Context:
    """As much of a gRPC context as the service sees."""

    def __init__(self, frontend: str = "0-1") -> None:
        self.frontend = frontend
        self.callbacks: list[Callable[[], None]] = []

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [(service.FRONTEND_KEY, self.frontend)]

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.callbacks.append(callback)
        return True

    def cancel(self) -> None:
        for callback in self.callbacks:
            callback()


class Client:
    """One front end's stream over a real socket; reads only when it is asked to."""

    def __init__(self, address: str, frontend: str) -> None:
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.commands: queue.SimpleQueue[pb.ConnectRequest | None] = queue.SimpleQueue()
        metadata = [(service.FRONTEND_KEY, frontend)]
        self.messages = TokenStreamStub(self._channel).Connect(iter(self.commands.get, None), metadata=metadata)

    def wait_ready(self) -> None:
        while next(self.messages).WhichOneof("message") != "info":
            pass

    def tokens(self, name: str) -> int:
        """Reads until the request's end; how many tokens it had."""
        count = 0
        for message in self.messages:
            for output in message.step.outputs:
                if output.request_id == name:
                    count += len(output.token_ids)
                    if output.finish_reason:
                        return count
        raise AssertionError("the stream ended before the request")

    def close(self) -> None:
        self.commands.put(None)
        self._channel.close()


@pytest.fixture
def state(make_llm: Callable[..., Any]) -> CoreState:
    """An engine that is ready."""
    llm = make_llm()
    state = CoreState()
    state.ready(llm._loop, engine_info(llm.config, llm.prepared, llm.startup_times))
    return state


@pytest.fixture
def connect(state: CoreState, tmp_path: Path) -> Iterator[Callable[[str], Client]]:
    """connect(name): a front end of that name on a server of the test's own. Leaves nothing in the engine."""
    server = grpc.server(ThreadPoolExecutor(8))
    add_TokenStreamServicer_to_server(TokenStreamService(state), server)
    address = f"unix:{tmp_path}/engine.sock"
    server.add_insecure_port(address)
    server.start()
    clients: list[Client] = []

    def make(name: str) -> Client:
        clients.append(Client(address, name))
        clients[-1].wait_ready()
        return clients[-1]

    yield make
    for client in clients:
        client.close()
    server.stop(1.0).wait()
    assert state.engine is not None
    until(lambda: not state.engine.open_samples)


def test_front_end_that_goes_takes_its_requests_along_and_no_others(
    state: CoreState, connect: Callable[[str], Client]
) -> None:
    goes, stays = connect("goes"), connect("stays")
    for i in range(3):
        goes.commands.put(submit(f"goes{i}"))
    stays.commands.put(submit("stays"))
    goes.tokens("goes0")
    goes.close()
    assert stays.tokens("stays") == 240
    until(lambda: not state.engine.open_samples)
    assert state.engine.core.scheduler.pages_used == 0


def test_what_arrives_while_a_stream_ends_is_not_submitted(state: CoreState) -> None:
    ended, read_out = threading.Event(), threading.Event()

    def commands() -> Iterator[pb.ConnectRequest]:
        ended.wait(30)
        yield submit("late")
        read_out.set()

    before = state.engine.core.counters.steps
    messages = TokenStreamService(state).Connect(commands(), Context())
    while next(messages).WhichOneof("message") != "info":
        pass
    next(messages)  # a second later: the reader is at work
    messages.close()
    ended.set()
    assert read_out.wait(30)
    state.engine.flush()
    assert state.engine.open_samples == 0 and state.engine.core.counters.steps == before


def test_front_end_that_comes_back_need_not_wait_until_its_old_stream_is_missed(state: CoreState) -> None:
    """As after a cut between two hosts, which the core would not hear of."""
    door = TokenStreamService(state)
    old, commands = Context(), queue.SimpleQueue()
    messages = door.Connect(iter(commands.get, None), old)
    seen: list[str] = []

    def read() -> None:
        for message in messages:
            seen.append(message.WhichOneof("message"))

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    commands.put(submit("same"))
    until(lambda: "step" in seen)
    again: queue.SimpleQueue[pb.ConnectRequest | None] = queue.SimpleQueue()
    again.put(submit("same"))
    count, ends = 0, []
    for message in door.Connect(iter(again.get, None), Context()):
        for output in message.step.outputs:
            count += len(output.token_ids)
            ends += [output.finish_reason] if output.finish_reason else []
        if ends:
            again.put(None)
    assert count == 240 and ends == ["length"]
    reading.join(30)
    assert not reading.is_alive()
    commands.put(None)


def test_front_end_that_does_not_read_is_cut_off_before_it_fills_the_memory(
    state: CoreState, connect: Callable[[str], Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_UNREAD", 500)
    asleep, awake = connect("asleep"), connect("awake")
    many = SamplingParams(temperature=0.0, max_tokens=240, ignore_eos=True, n=4, logprobs=20)
    for i in range(40):
        asleep.commands.put(submit(f"asleep{i}", many))
    until(lambda: state.engine.open_samples)
    awake.commands.put(submit("awake"))
    assert awake.tokens("awake") == 240
    until(lambda: not state.engine.open_samples)
    with pytest.raises(grpc.RpcError) as ended:
        for _ in asleep.messages:
            pass
    assert ended.value.code() is grpc.StatusCode.CANCELLED


def test_command_that_cannot_be_understood_ends_its_stream_and_no_other(
    state: CoreState, connect: Callable[[str], Client]
) -> None:
    odd, fine = connect("odd"), connect("fine")
    strange = submit("strange")
    strange.submit.requests[0].params.n = 10**6
    odd.commands.put(submit("ordinary"))
    odd.commands.put(strange)
    fine.commands.put(submit("fine"))
    for _ in odd.messages:
        pass
    assert fine.tokens("fine") == 240
    until(lambda: not state.engine.open_samples)
