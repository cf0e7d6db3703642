"""The engine's inbox: whatever happens, everybody who asked is answered, and only that."""

import queue
import time

import pytest

from jaxserve.engine.loop import EngineLoop
from jaxserve.errors import EngineError
from jaxserve.request import Request, SamplingParams

LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


class FakeCore:
    """As much of an EngineCore as the loop sees: `step` blocks until it is let go, and may fail."""

    def __init__(self):
        self.has_work = False
        self.stepping, self.go = queue.SimpleQueue(), queue.SimpleQueue()

    def add(self, request):
        self.has_work = True

    def step(self):
        self.stepping.put(True)
        if (error := self.go.get(timeout=30)) is not None:
            raise error
        return []


def a_request(name, **fields):
    return Request(id=name, prompt_token_ids=[5, 6, 7], params=LONG, arrival_time=time.monotonic(), **fields)


@pytest.mark.parametrize("end", ["failure", "close"])
def test_request_that_waits_while_the_engine_ends_is_told_so(end):
    core = FakeCore()
    loop = EngineLoop(core)
    running, waiting = queue.SimpleQueue(), queue.SimpleQueue()
    loop.submit([a_request("running")], running.put)
    core.stepping.get(timeout=30)
    loop.submit([a_request("waiting")], waiting.put)
    if end == "failure":
        core.go.put(EngineError("it broke"))
    else:
        core.go.put(None)
        loop._stopping = True  # as close() does, which would wait for the step
    for sink in (running, waiting):
        assert isinstance(sink.get(timeout=30), EngineError)
        assert sink.empty()
    loop.close()


def test_second_request_of_an_id_is_refused_and_the_first_goes_on(llm):
    first, second = queue.SimpleQueue(), queue.SimpleQueue()
    llm._loop.submit([a_request("twin")], first.put)
    llm._loop.submit([a_request("twin")], second.put)
    [refusal] = second.get(timeout=30)
    assert refusal.finish_reason == "error" and "twin" in refusal.stop_reason
    tokens, end = [], None
    while end is None:
        [output] = first.get(timeout=30)
        tokens += output.token_ids
        end = output.finish_reason
    assert end == "length" and len(tokens) == 200
    assert second.empty()
    assert llm._loop.error is None and llm._loop.open_samples == 0
