"""The engine in another process, behind the same interface; streams outlive it.

One stream joins this front end to the core and carries one message a step. When the core dies, a new one is awaited and
every open request is sent again with the tokens it had: sampling depends on (seed, position) only, so it goes on with
exactly the tokens it would have had. What was asked of a dead core is not lost; what it had not told is made again.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import grpc

from jaxserve.engine.stats import EngineStats
from jaxserve.errors import EngineError
from jaxserve.internal.v1 import tokens_pb2 as pb
from jaxserve.internal.v1.tokens_pb2_grpc import TokenStreamStub
from jaxserve.request import Request, TokenOutput
from jaxserve.scheduling.limits import Limits
from server.core.wire import output_from_wire, request_to_wire
from server.frontend.engine_client import EngineInfo, EngineStatus, Message, Phase, Sink
from server.frontend.resumable import ResumableRequest

logger = logging.getLogger(__name__)

RECONNECT_EVERY = 0.2  # seconds
AWAKE_WITHIN = 2.0  # seconds; an event loop that did not run for so long has not heard what was said meanwhile
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.max_send_message_length", 256 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
]


class RemoteEngine:
    """Implements `EngineClient` over gRPC. address: "unix:/path" or "host:port". name: of this front end, unique."""

    def __init__(self, address: str, name: str):
        self._address = address
        self._name = name
        self._info: EngineInfo | None = None
        self._status = EngineStatus()
        self._open: dict[str, ResumableRequest] = {}
        self._outgoing: asyncio.Queue[pb.ConnectRequest] | None = None  # of a connection to an engine that is ready
        self._ready = asyncio.Event()  # was once, or never will be
        self._awake = time.monotonic()  # when this event loop last ran, within AWAKE_WITHIN
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def info(self) -> EngineInfo | None:
        return self._info

    @property
    def status(self) -> EngineStatus:
        if time.monotonic() - self._awake > AWAKE_WITHIN:  # suspended, or busy: the silence is not the engine's
            return replace(self._status, heard=time.monotonic(), step_started=None)
        return self._status

    def submit(self, requests: Sequence[Request], sink: Sink) -> None:
        if self._status.phase == "dead":
            raise EngineError(f"the engine is dead: {self._status.detail}")
        if self._outgoing is not None:
            self._outgoing.put_nowait(_submission(requests))
        for request in requests:
            self._open[request.id] = ResumableRequest(request, sink)

    def abort(self, request_id: str, index: int | None = None, reason: str = "aborted") -> None:
        if self._outgoing is not None:
            self._outgoing.put_nowait(
                pb.ConnectRequest(abort=pb.Abort(request_id=request_id, index=index, reason=reason))
            )
        call = [self._open[request_id]] if request_id in self._open else []
        if index is None:
            call += [held for other, held in self._open.items() if other.startswith(request_id + ".")]
        for held in call:
            held.abort(index, reason)
        if self._outgoing is None:
            self._end_aborted(call)

    def reset_prefix_cache(self) -> None:
        if self._outgoing is not None:  # an engine that is being restarted begins with an empty one
            self._outgoing.put_nowait(pb.ConnectRequest(reset_prefix_cache=pb.ResetPrefixCache()))

    def supervised(self, phase: Phase, detail: str) -> None:
        """What the supervisor says of the engine process: "restarting", or "dead" for good."""
        self._status = replace(self._status, phase=phase, detail=detail)
        if phase == "dead":
            self._give_up(f"the engine is dead: {detail}")

    async def start(self) -> None:
        self._tasks = [asyncio.create_task(self._stay_connected()), asyncio.create_task(self._note_being_awake())]

    async def wait_ready(self) -> EngineInfo:
        await self._ready.wait()
        if self._info is None:
            raise EngineError(f"the engine is dead: {self._status.detail}")
        return self._info

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._give_up("the front end is closing")

    async def _note_being_awake(self) -> None:
        while True:
            self._status = self.status
            self._awake = time.monotonic()
            await asyncio.sleep(AWAKE_WITHIN / 2)

    async def _stay_connected(self) -> None:
        while True:
            try:
                async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                    await self._converse(channel)
            except grpc.RpcError:
                pass  # not there (yet, or any more)
            except Exception:
                logger.exception("the connection to the engine failed")
            self._outgoing = None
            if self._status.phase == "dead":
                return
            if self._status.phase == "ready":
                logger.warning("the engine is gone; %d open requests will go on when it is back", len(self._open))
                self._status = replace(self._status, phase="restarting", detail="its process ended")
            self._end_aborted([*self._open.values()])
            await asyncio.sleep(RECONNECT_EVERY)

    async def _converse(self, channel: grpc.aio.Channel) -> None:
        """One connection, until it ends."""
        outgoing: asyncio.Queue[pb.ConnectRequest] = asyncio.Queue()
        call = TokenStreamStub(channel).Connect(metadata=[("jaxserve-frontend", self._name)], wait_for_ready=True)
        writer = asyncio.create_task(_write_all(call, outgoing))
        try:
            async for message in call:
                match message.WhichOneof("message"):
                    case "step":
                        self._take_step(message.step)
                    case "status":
                        self._take_status(message.status)
                    case "info":
                        self._take_info(json.loads(message.info.json), outgoing)
                    case "failure":
                        logger.error("the engine failed: %s", message.failure)
                        return
        finally:
            writer.cancel()
            call.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    def _take_info(self, fields: dict[str, Any], outgoing: "asyncio.Queue[pb.ConnectRequest]") -> None:
        fields["limits"] = Limits(**fields["limits"])
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        again = self._info is not None
        self._info = EngineInfo(**fields)
        self._outgoing = outgoing
        self._status = replace(
            self._status,
            phase="ready",
            detail="",
            restarts=self._info.restarts,
            last_output=time.monotonic(),  # the start-up ended with a token
            step_started=None,
        )
        if self._open and again:
            logger.warning("the engine is back: %d open requests go on", len(self._open))
        for held in self._open.values():  # one by one: all of them might be more than one message may hold
            outgoing.put_nowait(_submission([held.resumption()]))
        self._ready.set()

    def _take_status(self, told: pb.EngineStatus) -> None:
        now = time.monotonic()
        status = self._status
        phase: Any = told.phase
        if phase == "ready" and self._outgoing is None:
            phase = status.phase  # its EngineInfo follows
        elif status.restarts or self._info is not None:
            phase = "ready" if phase == "ready" else "restarting"
        age = told.last_output_seconds if told.HasField("last_output_seconds") else None
        self._status = replace(
            status,
            phase=phase,
            detail=told.detail if phase != "restarting" else f"{told.phase} {told.detail}".strip(),
            heard=now,
            step_started=now - told.step_seconds if told.HasField("step_seconds") else None,
            last_output=max(now - age, status.last_output or 0.0) if age is not None else status.last_output,
            steps=told.steps,
            open_samples=told.open_samples,
            open_samples_here=told.open_samples_here,
            stats=_stats(told.stats_json) or status.stats,
        )

    def _take_step(self, step: pb.EngineStep) -> None:
        now = time.monotonic()
        self._status = replace(
            self._status,
            heard=now,
            last_output=now,
            step_started=None,
            open_samples=step.open_samples,
            open_samples_here=step.open_samples_here,
        )
        offset = now - step.sent_at
        messages: dict[Sink, list[TokenOutput]] = {}
        for told in step.outputs:
            held = self._open.get(told.request_id)
            if held is None:
                continue
            output = output_from_wire(told, offset)
            held.take(output)
            messages.setdefault(held.sink, []).append(output)
            if held.finished:
                del self._open[told.request_id]
        for sink, outputs in messages.items():
            _tell(sink, outputs)

    def _end_aborted(self, candidates: Iterable[ResumableRequest]) -> None:
        """Without an engine that could: ends the samples that were to be ended."""
        for held in candidates:
            outputs = held.end_aborted()
            if held.finished:
                self._open.pop(held.request.id, None)
            if outputs:
                _tell(held.sink, outputs)

    def _give_up(self, reason: str) -> None:
        self._ready.set()
        sinks = {held.sink for held in self._open.values()}
        self._open.clear()
        for sink in sinks:
            _tell(sink, EngineError(reason))


def _tell(sink: Sink, message: Message) -> None:
    """What one listener runs into must not keep the others' tokens from them."""
    try:
        sink(message)
    except Exception:
        logger.exception("a listener failed at what the engine told it")


def _submission(requests: Iterable[Request]) -> pb.ConnectRequest:
    now = time.monotonic()
    return pb.ConnectRequest(submit=pb.Submit(requests=[request_to_wire(request, now) for request in requests]))


async def _write_all(call: Any, outgoing: "asyncio.Queue[pb.ConnectRequest]") -> None:
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # the reader notices the end
        while True:
            await call.write(await outgoing.get())


def _stats(text: str) -> EngineStats | None:
    if not text:
        return None
    fields = json.loads(text)
    fields["step_token_buckets"] = tuple(fields["step_token_buckets"])
    return EngineStats(**fields)
