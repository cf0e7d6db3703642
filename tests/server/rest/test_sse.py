"""EventStream as an ASGI application: what it sends, when, and that its source is closed however it ends."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from server.errors import ServiceError
from server.rest.sse import DONE, KEEP_ALIVE, EventStream

SCOPE = {"type": "http", "state": {"request_id": "r-1"}}


class Source:
    """Events from a script: bytes are yielded, errors raised, anything else awaited."""

    def __init__(self, *script: Any):
        self.script = script
        self.closed = False
        self.taken = 0

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            for step in self.script:
                self.taken += 1
                if isinstance(step, bytes):
                    yield step
                elif isinstance(step, Exception):
                    raise step
                else:
                    await step()
        finally:
            self.closed = True


class Client:
    """The other side: keeps what is sent, and leaves when told."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()

    async def send(self, message: Any) -> None:
        await self.reads.wait()
        self.messages.append(message)

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def complete(self) -> bool:
        return bool(self.messages) and self.messages[-1].get("more_body") is False


def run(source: Source, scenario: Callable[[Client], Awaitable[None]] | None = None, keep_alive: float = 60) -> Client:
    """Serves the source to one client, beside a scenario, to its end."""

    async def main() -> Client:
        client = Client()
        acting = asyncio.ensure_future(scenario(client)) if scenario else None
        try:
            await EventStream(source.events(), keep_alive=keep_alive)(SCOPE, client.receive, client.send)
        finally:
            if acting is not None:
                await acting
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, "no task outlives the response"
        return client

    return asyncio.run(main())


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def forever() -> None:
    await asyncio.Event().wait()


def test_events_are_sent_in_order_and_the_response_completed() -> None:
    source = Source(b"data: 1\n\n", b"data: 2\n\n", DONE)
    client = run(source)
    assert client.body == b"data: 1\n\ndata: 2\n\n" + DONE
    assert client.messages[0]["type"] == "http.response.start" and client.messages[0]["status"] == 200
    headers = dict(client.messages[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"cache-control"] == b"no-cache" and b"content-length" not in headers
    assert client.complete and source.closed


def test_error_before_the_first_event_is_raised_and_nothing_sent() -> None:
    source = Source(ServiceError("queue_full", "full"))
    sent: list[Any] = []

    async def main() -> None:
        client = Client()
        sent.append(client.messages)
        await EventStream(source.events(), keep_alive=60)(SCOPE, client.receive, client.send)

    with pytest.raises(ServiceError, match="full"):
        asyncio.run(main())
    assert sent == [[]] and source.closed


def test_later_error_is_an_event_then_done() -> None:
    client = run(Source(b"data: 1\n\n", ServiceError("draining", "shutting down")))
    first, error, done = client.body.decode().strip().split("\n\n")
    assert first == "data: 1" and done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "draining"
    assert client.complete


def test_unforeseen_error_is_told_without_its_text_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    client = run(Source(b"data: 1\n\n", KeyError("secret")))
    assert b"internal_error" in client.body and b"secret" not in client.body
    assert "r-1" in caplog.text and "secret" in caplog.text


@pytest.mark.parametrize("events", [[], [b"data: 1\n\n"]])
def test_disconnect_closes_the_source_at_once(events: list[bytes]) -> None:
    source = Source(*events, forever)

    async def leave(client: Client) -> None:
        await until(lambda: source.taken == len(events) + 1)
        client.gone.set()

    client = run(source, leave)
    assert source.closed and not client.complete
    assert client.body == b"".join(events)


def test_silence_is_filled_with_comments_even_before_the_first_event() -> None:
    enough = asyncio.Event()

    async def listen(client: Client) -> None:
        await until(lambda: client.body.count(KEEP_ALIVE) >= 3)
        enough.set()

    client = run(Source(enough.wait, b"data: 1\n\n", DONE), listen, keep_alive=0.005)
    body = client.body
    assert body.startswith(KEEP_ALIVE * 3)
    assert body.replace(KEEP_ALIVE, b"") == b"data: 1\n\n" + DONE
    assert [message["type"] for message in client.messages].count("http.response.start") == 1


def test_error_after_a_keep_alive_is_an_event() -> None:
    enough = asyncio.Event()

    async def listen(client: Client) -> None:
        await until(lambda: KEEP_ALIVE in client.body)
        enough.set()

    client = run(Source(enough.wait, ServiceError("deadline_exceeded", "late")), listen, keep_alive=0.005)
    assert b"deadline_exceeded" in client.body and client.body.endswith(DONE)


def test_client_that_does_not_read_stops_the_source() -> None:
    source = Source(*[b"data: x\n\n"] * 100)

    async def stall(client: Client) -> None:
        client.reads.clear()
        await until(lambda: source.taken)
        for _ in range(50):
            await asyncio.sleep(0)
        assert source.taken == 1, "the next event is taken when the last one is out"
        client.gone.set()

    run(source, stall, keep_alive=0.002)
    assert source.closed


def test_cancelling_the_response_closes_the_source() -> None:
    source = Source(b"data: 1\n\n", forever)

    async def main() -> None:
        client = Client()
        stream = EventStream(source.events(), keep_alive=60)
        serving = asyncio.ensure_future(stream(SCOPE, client.receive, client.send))
        await until(lambda: source.taken == 2)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert source.closed

    asyncio.run(main())
