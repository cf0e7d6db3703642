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
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from jaxserve.engine.stats import EngineStats
from jaxserve.errors import EngineError
from jaxserve.internal.v1 import tokens_pb2 as pb
from jaxserve.internal.v1.tokens_pb2_grpc import TokenStreamStub
from jaxserve.request import Request, SampleProgress, TokenOutput
from jaxserve.scheduling.limits import Limits
from server.core.wire import output_from_wire, request_to_wire
from server.frontend.engine_client import EngineInfo, EngineStatus, Phase, Sink

logger = logging.getLogger(__name__)

RECONNECT_EVERY = 0.2  # seconds
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.max_send_message_length", 256 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(eq=False)
class _Open:
    """One unfinished request, and how far its samples are."""

    request: Request
    sink: Sink
    tokens: list[list[int]] = field(init=False)
    finished: list[bool] = field(init=False)
    aborts: dict[int, str] = field(default_factory=dict)  # sample -> reason, asked for and not yet answered
    cached_tokens: list[int] = field(init=False)
    preemptions: list[int] = field(init=False)  # on engines before this one
    prompt_logprobs_sent: int = 0
    resumed: bool = False

    def __post_init__(self) -> None:
        n = self.request.params.n
        self.tokens = [[] for _ in range(n)]
        self.finished = [False] * n
        self.cached_tokens = [0] * n
        self.preemptions = [0] * n

    def take(self, output: TokenOutput) -> None:
        """Notes what is new, and makes what a later engine says fit what an earlier one had said."""
        i = output.index
        self.tokens[i] += output.token_ids
        self.prompt_logprobs_sent += len(output.prompt_logprobs or ())
        self.finished[i] = output.finish_reason is not None
        if self.resumed:
            output.cached_tokens = self.cached_tokens[i]
            output.preemptions += self.preemptions[i]
        else:
            self.cached_tokens[i] = output.cached_tokens
            self.preemptions[i] = output.preemptions

    def resumption(self) -> Request:
        """The request as the next engine shall see it."""
        self.resumed = True
        return replace(
            self.request,
            progress=tuple(SampleProgress(tuple(t), f) for t, f in zip(self.tokens, self.finished, strict=True)),
            prompt_logprobs_sent=self.prompt_logprobs_sent,
        )


class RemoteEngine:
    """Implements `EngineClient` over gRPC. address: "unix:/path" or "host:port". name: of this front end, unique."""

    def __init__(self, address: str, name: str):
        self._address = address
        self._name = name
        self._info: EngineInfo | None = None
        self._status = EngineStatus()
        self._open: dict[str, _Open] = {}
        self._outgoing: asyncio.Queue[pb.ConnectRequest] | None = None  # of a connection to an engine that is ready
        self._ready = asyncio.Event()  # was once, or never will be
        self._task: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo | None:
        return self._info

    @property
    def status(self) -> EngineStatus:
        return self._status

    def submit(self, requests: Sequence[Request], sink: Sink) -> None:
        if self._status.phase == "dead":
            raise EngineError(f"the engine is dead: {self._status.detail}")
        for request in requests:
            self._open[request.id] = _Open(request, sink)
        if self._outgoing is not None:
            self._send_requests(requests)

    def abort(self, request_id: str, index: int | None = None, reason: str = "aborted") -> None:
        if self._outgoing is not None:
            self._outgoing.put_nowait(
                pb.ConnectRequest(abort=pb.Abort(request_id=request_id, index=index, reason=reason))
            )
        call = [self._open[request_id]] if request_id in self._open else []
        if index is None:
            call += [held for other, held in self._open.items() if other.startswith(request_id + ".")]
        for held in call:
            held.aborts |= {i: reason for i, done in enumerate(held.finished) if not done and index in (None, i)}
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
        self._task = asyncio.create_task(self._stay_connected())

    async def wait_ready(self) -> EngineInfo:
        await self._ready.wait()
        if self._info is None:
            raise EngineError(f"the engine is dead: {self._status.detail}")
        return self._info

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._give_up("the front end is closing")

    async def _stay_connected(self) -> None:
        while True:
            try:
                async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                    await self._converse(channel)
            except grpc.RpcError:
                pass  # not there (yet, or any more)
            except asyncio.CancelledError:
                raise
            except Exception:
                logger.exception("the connection to the engine failed")
            self._outgoing = None
            if self._status.phase == "dead":
                return
            if self._status.phase == "ready":
                logger.warning("the engine is gone; %d open requests will go on when it is back", len(self._open))
                self._status = replace(self._status, phase="restarting", detail="its process ended")
            self._end_aborted(list(self._open.values()))
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
        if self._open:
            if again:
                logger.warning("the engine is back: %d open requests go on", len(self._open))
            self._send_requests([held.resumption() if again else held.request for held in self._open.values()])
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
            if all(held.finished):
                del self._open[told.request_id]
        for sink, outputs in messages.items():
            sink(outputs)

    def _send_requests(self, requests: Iterable[Request]) -> None:
        assert self._outgoing is not None
        now = time.monotonic()
        wire = [request_to_wire(request, now) for request in requests]
        self._outgoing.put_nowait(pb.ConnectRequest(submit=pb.Submit(requests=wire)))

    def _end_aborted(self, candidates: Iterable[_Open]) -> None:
        """Without an engine that could: ends the samples that were to be ended."""
        for held in candidates:
            outputs = [
                TokenOutput(
                    request_id=held.request.id, index=i, token_ids=[], finish_reason="abort", stop_reason=reason
                )
                for i, reason in held.aborts.items()
                if not held.finished[i]
            ]
            for output in outputs:
                held.finished[output.index] = True
            if all(held.finished):
                del self._open[held.request.id]
            if outputs:
                held.sink(outputs)

    def _give_up(self, reason: str) -> None:
        self._ready.set()
        sinks = {held.sink for held in self._open.values()}
        self._open.clear()
        for sink in sinks:
            sink(EngineError(reason))


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
