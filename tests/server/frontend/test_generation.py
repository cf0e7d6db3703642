"""One call's requests: what was generated comes before what failed, and whatever happens, all is given back once."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from jaxserve.engine.assembler import RequestAssembler
from jaxserve.errors import EngineError
from jaxserve.request import Request, SamplingParams, TokenOutput
from server.errors import ServiceError
from server.frontend.generation import Generation


class Engine:
    """Takes note; the test tells what it answers."""

    def __init__(self) -> None:
        self.sink: Any = None
        self.aborts: list[tuple[str, int | None, str]] = []

    def submit(self, requests: Any, sink: Any) -> None:
        self.sink = sink

    def abort(self, request_id: str, index: int | None = None, reason: str = "aborted") -> None:
        self.aborts.append((request_id, index, reason))

    def tell(self, name: str, *tokens: int, index: int = 0, end: str | None = None, reason: Any = None) -> None:
        output = TokenOutput(
            request_id=name,
            index=index,
            token_ids=[*tokens],
            finish_reason=end,
            stop_reason=reason,  # type: ignore[arg-type]
        )
        self.sink([output])


class Observer:
    def __init__(self) -> None:
        self.ends: list[tuple[str, str | None]] = []

    def begin(self, request_id: str, call: Any) -> None: ...

    def tokens(self, assembler: RequestAssembler, index: int, count: int, now: float) -> None: ...

    def finished(self, assembler: RequestAssembler, now: float, error_code: str | None) -> None:
        self.ends.append((assembler.request.id, error_code))

    def rejected(self, code: str) -> None: ...


class Call:
    def __init__(self, *names: str, deadline: float | None = None, tokenizer: Any = None, **params: Any) -> None:
        self.engine, self.observer, self.closed = Engine(), Observer(), 0
        given = {"max_tokens": 100, "detokenize": tokenizer is not None, **params}
        requests = [
            Request(id=name, prompt_token_ids=[5], params=SamplingParams(**given), deadline=deadline) for name in names
        ]
        assemblers = [RequestAssembler(request, None, tokenizer) for request in requests]
        self.generation = Generation(requests, assemblers, self.engine, self.observer)  # type: ignore[arg-type]
        self.generation.when_closed(self._count)
        self.generation.start()

    def _count(self) -> None:
        self.closed += 1

    async def read(self) -> tuple[list[int], str | None]:
        """(tokens, code of the error) until the end."""
        tokens: list[int] = []
        try:
            async for batch in self.generation.deltas():
                tokens += [token for _, delta in batch for token in delta.token_ids]
        except ServiceError as error:
            return tokens, error.code
        return tokens, None


def run(body: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await body

    asyncio.run(bounded())


def test_what_came_before_an_error_is_read_before_it_and_nothing_after() -> None:
    async def body() -> None:
        call = Call("a", "b")
        async with call.generation:
            call.engine.tell("a", 1, 2)
            call.engine.tell("b", 3, end="error", reason="numerical_error")
            call.engine.tell("a", 4)
            assert await call.read() == ([1, 2], "numerical_error")
        assert call.observer.ends == [("a", "numerical_error"), ("b", "numerical_error")]

    run(body())


def test_error_reaches_a_reader_that_is_slower_than_the_tokens_of_the_other_requests() -> None:
    async def body() -> None:
        call = Call("a", "b")
        batches = 0
        async with call.generation:
            call.engine.tell("b", end="abort", reason="deadline_exceeded")
            call.engine.tell("a", 1)
            with pytest.raises(ServiceError):
                async for _ in call.generation.deltas():
                    batches += 1
                    call.engine.tell("a", 1)  # always something new
                    assert batches < 3

    run(body())


def test_end_of_the_engine_is_no_concern_of_a_call_that_has_all_its_tokens() -> None:
    async def body() -> None:
        call = Call("a")
        async with call.generation:
            call.engine.tell("a", 1, 2, end="length")
            call.engine.sink(EngineError("the engine is dead"))
            assert await call.read() == ([1, 2], None)
        assert call.observer.ends == [("a", None)]

    run(body())


def test_engine_that_dies_ends_an_unfinished_call_with_an_error() -> None:
    async def body() -> None:
        call = Call("a", "b")
        async with call.generation:
            call.engine.tell("a", 1, end="length")
            call.engine.sink(EngineError("the engine is dead"))
            assert await call.read() == ([1], "engine_dead")
        assert call.engine.aborts == []

    run(body())


def test_closing_a_call_from_elsewhere_wakes_who_waits_for_it() -> None:
    async def body() -> None:
        call = Call("a")
        reader = asyncio.create_task(call.read())
        await asyncio.sleep(0)
        call.generation.close()
        assert await reader == ([], "cancelled")

    run(body())


def test_call_is_given_back_once_however_often_it_is_closed() -> None:
    async def body() -> None:
        call = Call("a", "b", n=2)
        async with call.generation:
            call.engine.tell("a", 1, end="length")
            call.generation.close()
        call.generation.close()
        call.engine.tell("b", 5, end="abort", reason="client_gone")
        assert call.closed == 1
        assert call.observer.ends == [("a", "cancelled"), ("b", "cancelled")]
        assert sorted(call.engine.aborts) == [("a", None, "client_gone"), ("b", None, "client_gone")]

    run(body())


def test_deadline_that_passes_after_the_end_changes_nothing() -> None:
    async def body() -> None:
        call = Call("a", deadline=time.monotonic() - 10)
        async with call.generation:
            call.engine.tell("a", 1, end="length")
            await asyncio.sleep(0.01)  # the timer is due
            assert await call.read() == ([1], None)

    run(body())


def test_stop_string_ends_the_sample_here_and_asks_the_engine_to_end_it_too(make_llm: Any) -> None:
    tokenizer = make_llm().tokenizer

    async def body() -> None:
        call = Call("a", tokenizer=tokenizer, n=2, stop=["fox"])
        words = tokenizer.encode("The quick brown fox jumps", add_special_tokens=False)
        async with call.generation:
            for token in words:
                call.engine.tell("a", token, index=1)
            assert call.engine.aborts == [("a", 1, "stop_string")]
            call.engine.tell("a", index=1, end="abort", reason="stop_string")
            call.engine.tell("a", words[0], index=0, end="length")
            await call.read()
            [output] = call.generation.current()
        assert [sample.text for sample in output.outputs] == ["The", "The quick brown "]
        assert [sample.finish_reason for sample in output.outputs] == ["length", "stop"]
        assert call.observer.ends == [("a", None)]

    run(body())


def test_outputs_of_a_call_that_has_failed_already_raise() -> None:
    async def body() -> None:
        call = Call("a")
        call.generation.end("draining")
        async with call.generation:
            with pytest.raises(ServiceError) as failed:
                await call.generation.outputs()
        assert failed.value.code == "draining"
        assert call.engine.aborts == [("a", None, "client_gone")]

    run(body())
