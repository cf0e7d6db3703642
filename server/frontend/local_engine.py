"""The engine in this process: an `EngineLoop` behind the interface of a remote one. For --in-process, and for tests."""

import asyncio
import contextlib
import time
from collections.abc import Sequence

from jaxserve.engine.loop import EngineLoop
from jaxserve.engine.stats import engine_stats
from jaxserve.errors import EngineError
from jaxserve.request import Request
from server.frontend.engine_client import EngineInfo, EngineStatus, Message, Sink


class LocalEngine:
    """Implements `EngineClient` over a loop that is ready. Closing it closes the loop."""

    def __init__(self, loop: EngineLoop, info: EngineInfo):
        self._engine = loop
        self._info = info
        self._events: asyncio.AbstractEventLoop | None = None
        self._started = time.monotonic()

    @property
    def info(self) -> EngineInfo | None:
        return self._info

    @property
    def status(self) -> EngineStatus:
        engine = self._engine
        return EngineStatus(
            phase="ready" if engine.error is None else "dead",
            detail="" if engine.error is None else str(engine.error),
            heard=time.monotonic(),
            step_started=engine.step_started,
            last_output=engine.last_output or self._started,  # the start-up ended with a token
            steps=engine.core.counters.steps,
            open_samples=engine.open_samples,
            open_samples_here=engine.open_samples,
            stats=engine_stats(engine.core),
        )

    def submit(self, requests: Sequence[Request], sink: Sink) -> None:
        events = self._events
        assert events is not None, "not started"

        def relay(message: Message) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                events.call_soon_threadsafe(sink, message)

        self._engine.submit(requests, relay)

    def abort(self, request_id: str, index: int | None = None, reason: str = "aborted") -> None:
        if self._engine.error is None:
            self._engine.abort(request_id, index, reason)

    def reset_prefix_cache(self) -> None:
        self._engine.reset_prefix_cache()

    async def start(self) -> None:
        self._events = asyncio.get_running_loop()

    async def wait_ready(self) -> EngineInfo:
        if self._engine.error is not None:
            raise EngineError(str(self._engine.error))
        return self._info

    async def close(self) -> None:
        await asyncio.to_thread(self._engine.close)
