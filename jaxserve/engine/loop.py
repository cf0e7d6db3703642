"""The engine core on a thread of its own, so that nothing a caller does (or its Ctrl-C) can tear a step apart.

Callers talk to it through an inbox; it answers every request through the sink given with it, one message a step.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from jaxserve.engine.core import EngineCore
from jaxserve.errors import EngineError, InvalidRequestError
from jaxserve.request import Request, TokenOutput

logger = logging.getLogger(__name__)

Message = list[TokenOutput] | EngineError  # an error is the last message a sink gets
Sink = Callable[[Message], None]  # called on the engine thread; must not block
Command = Callable[[], list[TokenOutput]]


class EngineLoop:
    """Thread-safe front of an `EngineCore`; starts its thread at once."""

    def __init__(self, core: EngineCore):
        self.core = core
        self._inbox: deque[tuple[Command, Sink | None]] = deque()  # and who waits for an answer to it
        self._wake = threading.Condition()
        self._stopping = False
        self._error: EngineError | None = None
        self._sinks: dict[str, tuple[Sink, int]] = {}  # request id -> (sink, samples unfinished)
        self.open_samples = 0  # submitted and not ended; as the other two, written by the engine thread alone
        self.step_started: float | None = None  # time.monotonic() of the step in progress; None = idle
        self.last_output: float | None = None  # time.monotonic() when anything was last generated
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], sink: Sink) -> None:
        """Queues requests, all before the next step; `sink` gets their outputs.

        One that the scheduler refuses ends with finish_reason "error" and the reason as stop_reason. Raises
        EngineError if the engine is dead or closed.
        """

        def add() -> list[TokenOutput]:
            refused: list[TokenOutput] = []
            for request in requests:
                try:
                    self.core.add(request)
                except InvalidRequestError as error:
                    refused += [_refusal(request, index, error) for index in request.open_samples]
                else:
                    self._sinks[request.id] = (sink, len(request.open_samples))
                    self.open_samples += len(request.open_samples)
            if refused:
                sink(refused)  # not by their ids, which may be another request's
            return []

        self._command(add, sink)

    @property
    def error(self) -> EngineError | None:
        """Why the engine stopped for good; None while it runs."""
        return self._error

    def abort(self, request_id: str, index: int | None = None, reason: str = "aborted") -> None:
        """Ends a request or one sample; its sink is told like of any other end. Unknown ids are ignored.

        Without an index, the requests of the same call end too: those whose id is this one, a dot and more.
        """

        def end() -> list[TokenOutput]:
            if index is not None:
                return self.core.abort(request_id, index, reason)
            call = [other for other in self._sinks if other == request_id or other.startswith(request_id + ".")]
            return [output for other in call for output in self.core.abort(other, None, reason)]

        self._command(end)

    def reset_prefix_cache(self) -> None:
        def reset() -> list[TokenOutput]:
            self.core.scheduler.reset_prefix_cache()
            return []

        self._command(reset)

    def flush(self) -> None:
        """Returns when everything asked for before was done, or the engine stopped."""
        done = threading.Event()

        def mark() -> list[TokenOutput]:
            done.set()
            return []

        self._command(mark)
        while not done.wait(0.1) and self._thread.is_alive():
            pass

    def close(self) -> None:
        """Stops after the step in progress; unfinished requests get an EngineError. Safe to call twice."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:  # the collector may run a finalizer anywhere
            self._thread.join()

    def _command(self, command: Command, sink: Sink | None = None) -> None:
        with self._wake:
            if self._error is not None or self._stopping:
                raise self._error or EngineError("the engine was closed")
            self._inbox.append((command, sink))
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                outputs: list[TokenOutput] = []
                while self._inbox:
                    command, _ = self._inbox[0]
                    outputs += command()
                    self._inbox.popleft()
                if self.core.has_work:
                    self.step_started = time.monotonic()
                    outputs += self.core.step()
                    self.step_started = None
                if outputs:
                    self.last_output = time.monotonic()
                self._deliver(outputs)
            self._fail(EngineError("the engine was closed"))
        except BaseException as error:  # the thread must never die without telling those who wait for it
            logger.exception("the engine stopped")
            self._fail(error if isinstance(error, EngineError) else EngineError(f"the engine stopped: {error!r}"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._stopping or self._inbox or self.core.has_work):
                self._wake.wait()
            return not self._stopping

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        messages: dict[int, tuple[Sink, list[TokenOutput]]] = {}
        for output in outputs:
            sink, unfinished = self._sinks[output.request_id]
            messages.setdefault(id(sink), (sink, []))[1].append(output)
            if output.finish_reason is not None:
                self.open_samples -= 1
                if unfinished == 1:
                    del self._sinks[output.request_id]
                else:
                    self._sinks[output.request_id] = (sink, unfinished - 1)
        for sink, message in messages.values():
            sink(message)

    def _fail(self, error: EngineError) -> None:
        sinks = {id(sink): sink for sink, _ in self._sinks.values()}
        with self._wake:
            self._error = error
            sinks |= {id(sink): sink for _, sink in self._inbox if sink is not None}
            self._inbox.clear()
        for sink in sinks.values():
            sink(error)
        self._sinks.clear()


def _refusal(request: Request, index: int, error: InvalidRequestError) -> TokenOutput:
    return TokenOutput(request_id=request.id, index=index, token_ids=[], finish_reason="error", stop_reason=str(error))
