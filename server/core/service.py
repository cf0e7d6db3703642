"""The core's door: one stream per front end, commands in, one message a step out.

The engine thread only puts lists into a queue; turning them into messages is the stream's own thread's work, and what
has piled up while a front end was slow goes out as one message. A front end that reads nothing for too long is hung up
on: it comes back when it can, with the same requests.
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import grpc

from jaxserve.engine.loop import EngineLoop, Message
from jaxserve.engine.stats import engine_stats
from jaxserve.errors import EngineError
from jaxserve.internal.v1 import tokens_pb2 as pb
from jaxserve.internal.v1.tokens_pb2_grpc import TokenStreamServicer
from jaxserve.request import Request, TokenOutput
from server.core.wire import output_to_wire, request_from_wire
from server.frontend.engine_client import EngineInfo

logger = logging.getLogger(__name__)

STATUS_EVERY = 1.0  # seconds
MAX_UNREAD = 500_000  # outputs that wait for one front end to read; a few hundred bytes each
FRONTEND_KEY = "jaxserve-frontend"  # metadata: which front end a stream belongs to


@dataclass
class CoreState:
    """Where the core is; written by its start-up, read by every stream."""

    phase: str = "planning"
    detail: str = ""
    engine: EngineLoop | None = None
    info: EngineInfo | None = None

    def report(self, phase: str, detail: str) -> None:
        self.phase, self.detail = phase, detail

    def ready(self, engine: EngineLoop, info: EngineInfo) -> None:
        self.engine, self.info = engine, info
        self.report("ready", "")

    @property
    def step_age(self) -> float | None:
        """Seconds the step in progress has been running; None = idle."""
        started = self.engine.step_started if self.engine is not None else None
        return None if started is None else max(0.0, time.monotonic() - started)


@dataclass(eq=False)
class _Stream:
    """One front end's connection.

    hang_up  ends it from this side
    open     samples unfinished by request id, of the engine thread once submitted
    """

    hang_up: Callable[[], object]
    outbox: "queue.SimpleQueue[Message | None]" = field(default_factory=queue.SimpleQueue)
    open: dict[str, int] = field(default_factory=dict)
    num_told: int = 0  # outputs put into the outbox, by the engine thread
    num_read: int = 0  # and taken out, by the stream's
    submitting: threading.Lock = field(default_factory=threading.Lock)
    ended: bool = False  # nothing is submitted any more
    closed: threading.Event = field(default_factory=threading.Event)  # nothing of it is left in the engine

    @property
    def num_open(self) -> int:
        return sum(list(self.open.values()))

    def sink(self, message: Message) -> None:
        if not isinstance(message, EngineError):
            self.num_told += len(message)
            if self.num_told - self.num_read > MAX_UNREAD:
                self.hang_up()
            for output in message:
                if output.finish_reason is not None:
                    left = self.open.pop(output.request_id, 1) - 1
                    if left:
                        self.open[output.request_id] = left
        self.outbox.put(message)


class TokenStreamService(TokenStreamServicer):
    def __init__(self, state: CoreState):
        self._state = state
        self._lock = threading.Lock()
        self._streams: dict[str, _Stream] = {}  # by front end

    def Connect(
        self, request_iterator: Iterator[pb.ConnectRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ConnectResponse]:
        frontend = dict(context.invocation_metadata()).get(FRONTEND_KEY, "")
        stream = _Stream(context.cancel)
        with self._lock:
            previous, self._streams[frontend] = self._streams.get(frontend), stream
        if previous is not None:  # it comes back with the same request ids
            previous.hang_up()
            previous.closed.wait()
        context.add_callback(lambda: stream.outbox.put(None))
        reader = threading.Thread(target=self._read, args=(request_iterator, stream), daemon=True)
        try:
            yield from self._write(stream, reader)
        finally:
            self._close(stream)
            with self._lock:
                if self._streams.get(frontend) is stream:
                    del self._streams[frontend]

    def _write(self, stream: _Stream, reader: threading.Thread) -> Iterator[pb.ConnectResponse]:
        state = self._state
        told, last_status = "", 0.0
        while True:
            now = time.monotonic()
            if state.phase + state.detail != told or now - last_status >= STATUS_EVERY:
                told, last_status = state.phase + state.detail, now
                yield pb.ConnectResponse(status=self._status(stream))
            if state.engine is not None and state.engine.error is not None:  # this process is about to end
                yield pb.ConnectResponse(failure=str(state.engine.error))
                return
            if state.info is not None and not reader.ident:
                yield pb.ConnectResponse(info=pb.EngineInfo(json=json.dumps(asdict(state.info))))
                reader.start()
            try:
                waiting = STATUS_EVERY if state.info is not None else STATUS_EVERY / 10
                message = stream.outbox.get(timeout=waiting)
            except queue.Empty:
                continue
            outputs: list[TokenOutput] = []
            while message is not None and not isinstance(message, EngineError):
                outputs += message
                if stream.outbox.empty():
                    break
                message = stream.outbox.get()
            stream.num_read += len(outputs)
            if outputs:
                yield pb.ConnectResponse(step=self._step(stream, outputs))
            if message is None:
                return
            if isinstance(message, EngineError):
                yield pb.ConnectResponse(failure=str(message))
                return

    def _read(self, commands: Iterator[pb.ConnectRequest], stream: _Stream) -> None:
        """Passes commands on until the stream ends, however it does."""
        engine = self._state.engine
        assert engine is not None
        try:
            for command in commands:
                match command.WhichOneof("command"):
                    case "submit":
                        self._submit(engine, stream, [request_from_wire(r) for r in command.submit.requests])
                    case "abort":
                        abort = command.abort
                        engine.abort(abort.request_id, abort.index if abort.HasField("index") else None, abort.reason)
                    case "reset_prefix_cache":
                        engine.reset_prefix_cache()
        except grpc.RpcError:
            pass  # the front end is gone
        except EngineError as error:
            stream.outbox.put(error)
        except Exception:
            logger.exception("a command of a front end could not be carried out")
        finally:
            stream.outbox.put(None)

    def _submit(self, engine: EngineLoop, stream: _Stream, requests: list[Request]) -> None:
        with stream.submitting:
            if stream.ended:
                return
            for request in requests:
                stream.open[request.id] = len(request.open_samples)
            engine.submit(requests, stream.sink)

    def _close(self, stream: _Stream) -> None:
        engine = self._state.engine
        with stream.submitting:
            stream.ended = True
        try:
            if engine is not None:
                for request_id in list(stream.open):
                    engine.abort(request_id, None, "client_gone")
                engine.flush()
        except EngineError:
            pass  # a dead engine holds nothing
        finally:
            stream.closed.set()

    def _step(self, stream: _Stream, outputs: list[TokenOutput]) -> pb.EngineStep:
        assert self._state.engine is not None
        return pb.EngineStep(
            outputs=map(output_to_wire, outputs),
            open_samples=self._state.engine.open_samples,
            open_samples_here=stream.num_open,
            sent_at=time.monotonic(),
        )

    def _status(self, stream: _Stream) -> pb.EngineStatus:
        state, engine = self._state, self._state.engine
        status = pb.EngineStatus(phase=state.phase, detail=state.detail)
        if (age := state.step_age) is not None:
            status.step_seconds = age
        if engine is not None:
            if engine.last_output is not None:
                status.last_output_seconds = time.monotonic() - engine.last_output
            status.steps = engine.core.counters.steps
            status.open_samples = engine.open_samples
            status.open_samples_here = stream.num_open
            status.stats_json = json.dumps(asdict(engine_stats(engine.core)))
        return status
