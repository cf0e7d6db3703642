"""The requests of one call, running: what both protocols stream from, in the terms of neither."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

from jaxserve.engine.assembler import RequestAssembler
from jaxserve.errors import EngineError
from jaxserve.request import Request, RequestDelta, RequestMetrics, RequestOutput, TokenOutput
from server.errors import ServiceError, service_error
from server.frontend.engine_client import EngineClient, Message
from server.observability.records import RequestObserver

logger = logging.getLogger(__name__)

DEADLINE_GRACE = 0.5  # seconds

Deltas = list[tuple[int, RequestDelta]]  # (position of the prompt in the call, what is new in one of its samples)

# stop_reason of an abort -> the error its client gets; an abort for any other reason is an ordinary end
ABORTS = {"deadline_exceeded": "deadline_exceeded", "shutting_down": "draining"}
ABORT_MESSAGES = {
    "deadline_exceeded": "the request was not finished when its deadline passed",
    "draining": "the server is shutting down and its drain timeout passed",
}


class Generation:
    """An async context manager: leaving it ends whatever is unfinished and frees its pages.

    Made by `Frontend.generate` when every request is accepted, on the event loop; call `deltas` or `outputs` once.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        assemblers: Sequence[RequestAssembler],
        engine: EngineClient,
        observer: RequestObserver,
    ):
        self.requests = requests
        self._assemblers = {a.request.id: (position, a) for position, a in enumerate(assemblers)}
        self._engine = engine
        self._observer = observer
        self._on_close: Callable[[], None] = lambda: None
        self._open = {(request.id, index) for request in requests for index in range(request.params.n)}
        self._deltas: Deltas = []  # not yet pulled
        self._news = asyncio.Event()
        self._error: ServiceError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def start(self) -> None:
        """Hands the requests to the engine. Raises EngineError if it is dead.

        The engine keeps their deadlines; should it be unable to, they are kept here a moment later.
        """
        self._engine.submit(self.requests, self._receive)
        deadlines = [request.deadline for request in self.requests if request.deadline is not None]
        if deadlines:
            delay = max(deadlines) - time.monotonic() + DEADLINE_GRACE
            self._timer = asyncio.get_running_loop().call_later(delay, self.end, "deadline_exceeded")

    def when_closed(self, function: Callable[[], None]) -> None:
        self._on_close = function

    def end(self, code: str) -> None:
        """Ends everything unfinished with one of ABORT_MESSAGES for an error."""
        if self._open:
            self._fail(ServiceError(code, ABORT_MESSAGES[code]))

    async def __aenter__(self) -> "Generation":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and self._error is None and self._open:
            self._error = service_error(error) if isinstance(error, Exception) else _cancelled()
        self.close()

    def close(self) -> None:
        """Ends what is unfinished. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._open and self._error is None:
            self._fail(_cancelled())
        for request_id in {request_id for request_id, _ in self._open}:
            self._engine.abort(request_id, None, "client_gone")
        self._on_close()
        now = time.monotonic()
        for _, assembler in self._assemblers.values():
            self._observer.finished(assembler, now, self._error.code if self._error else None)

    @property
    def finished(self) -> bool:
        return not self._open

    async def deltas(self) -> AsyncIterator[Deltas]:
        """Yields everything new since the last time, in order. Raises ServiceError where a request fails.

        What was generated before an error is yielded before it is raised.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            if self._deltas:
                batch, self._deltas = self._deltas, []
                yield batch
            elif self._error is not None:
                raise self._error
            if self.finished and not self._deltas and self._error is None:
                return
            if self.finished or self._error is not None:
                self._news.set()

    async def outputs(self) -> list[RequestOutput]:
        """Waits for the end of all. Raises ServiceError if any fails."""
        async for _ in self.deltas():
            pass
        return self.current()

    def current(self) -> list[RequestOutput]:
        """Everything so far, by prompt."""
        return [assembler.output() for _, assembler in self._assemblers.values()]

    def output(self, position: int) -> RequestOutput:
        """Everything so far of one prompt."""
        return self._assemblers[self.requests[position].id][1].output()

    @property
    def metrics(self) -> list[RequestMetrics]:
        """So far, by prompt."""
        return [assembler.metrics for _, assembler in self._assemblers.values()]

    def _receive(self, message: Message) -> None:
        if isinstance(message, EngineError):
            if self._open:
                self._open.clear()
                self._fail(service_error(message))
            return
        now = time.monotonic()
        try:
            for output in message:
                self._take(output, now)
        except Exception as error:  # of our own making; it must not reach the requests of others
            logger.exception("request %s: its tokens could not become text", message[0].request_id)
            self._fail(service_error(error))
        if self._deltas or self.finished:
            self._news.set()

    def _take(self, output: TokenOutput, now: float) -> None:
        position, assembler = self._assemblers[output.request_id]
        if output.finish_reason is not None:
            self._open.discard((output.request_id, output.index))
        if self._closed or self._error is not None:
            return
        delta, must_end = assembler.feed(output, now)
        if must_end:  # the client need not wait until the engine has ended it too
            self._open.discard((output.request_id, output.index))
            self._engine.abort(output.request_id, output.index, "stop_string")
        if delta is None:
            return
        self._observer.tokens(assembler, output.index, len(delta.token_ids), now)
        if delta.finish_reason == "abort" and str(delta.stop_reason) in ABORTS:
            code = ABORTS[str(delta.stop_reason)]
            self._fail(ServiceError(code, ABORT_MESSAGES[code]))
        elif delta.finish_reason == "error":
            assert assembler.error is not None
            self._fail(service_error(assembler.error))
        else:
            self._deltas.append((position, delta))

    def _fail(self, error: ServiceError) -> None:
        self._error = self._error or error
        self._news.set()


def _cancelled() -> ServiceError:
    return ServiceError("cancelled", "the client went away")
