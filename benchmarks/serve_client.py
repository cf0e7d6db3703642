"""The client of serve.py, a process of its own: a job as JSON on stdin in, what the streams saw as JSON on stdout out.

While streams run it only notes when bytes came; it reads them when all is over, so that it takes little from the server
it measures. REST: one connection a request, server-sent events. gRPC: one connection for all, GenerateStream.

    job     {"protocol": "rest" | "grpc", "host", "port", "model", "sequential", "cache_salt",
             "requests": [{"prompt": [token ids], "max_tokens"}]}
    report  {"wall_s", "client_cpu_s", "streams": [{"started", "events": [...], "output_tokens", "cached_tokens"}]}
            seconds since the job began; an event is a message with text in it

Greedy, end-of-sequence ignored. A stream that fails, or ends early, ends the process with exit code 1 and a sentence.
"""

import asyncio
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import h11
import uvloop

Arrived = list[tuple[float, bytes]]  # (time.perf_counter() seconds, what came)


class Stream(Protocol):
    """One request, encoded before the clock starts."""

    started: float
    arrived: Arrived

    async def run(self) -> None:
        """From connecting to the last byte."""
        ...

    def report(self) -> dict[str, Any]: ...


class RestStream(asyncio.Protocol):
    def __init__(self, job: dict[str, Any], request: dict[str, Any]):
        self._address = job["host"], job["port"]
        body = {
            "model": job["model"],
            "prompt": request["prompt"],
            "max_tokens": request["max_tokens"],
            "cache_salt": job["cache_salt"],
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        content = json.dumps(body).encode()
        self._connection = h11.Connection(h11.CLIENT)
        headers = [
            ("Host", f"{job['host']}:{job['port']}"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(content))),
            ("Connection", "close"),
        ]
        head = self._connection.send(h11.Request(method="POST", target="/v1/completions", headers=headers))
        self._request = (head or b"") + (self._connection.send(h11.Data(data=content)) or b"")
        self._connection.send(h11.EndOfMessage())
        self.started = 0.0
        self.arrived: Arrived = []

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._closed = loop.create_future()
        self.started = time.perf_counter()
        await loop.create_connection(lambda: self, *self._address)
        await self._closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self.arrived.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self._closed.set_result(None)

    def report(self) -> dict[str, Any]:
        events, usage = [], None
        for moment, data in self._events():
            if data == b"[DONE]":
                continue
            message = json.loads(data)
            if "error" in message:
                raise SystemExit(f"a stream failed: {message['error']}")
            usage = message["usage"] or usage
            if any(choice["text"] for choice in message["choices"]):
                events.append(moment)
        if usage is None:
            raise SystemExit("a stream ended before its last message")
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return _report(self.started, events, usage["completion_tokens"], cached)

    def _events(self) -> Iterator[tuple[float, bytes]]:
        """(when it was complete, what it says) of every server-sent event."""
        left = b""
        for moment, data in self._body():
            *whole, left = (left + data).split(b"\n\n")
            for event in whole:
                if event.startswith(b"data: "):
                    yield moment, event.removeprefix(b"data: ")

    def _body(self) -> Iterator[tuple[float, bytes]]:
        for moment, data in self.arrived:
            self._connection.receive_data(data)
            while isinstance(event := self._connection.next_event(), h11.Event):
                if isinstance(event, h11.Response) and event.status_code != 200:
                    told = b"".join(data for _, data in self.arrived).decode(errors="replace")
                    raise SystemExit(f"a request was refused: {told}")
                if isinstance(event, h11.Data):
                    yield moment, bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    return


class GrpcStream:
    def __init__(self, method: Any, job: dict[str, Any], request: dict[str, Any]):
        from jaxserve.v1 import inference_pb2 as pb

        self._method = method
        self._response = pb.GenerateStreamResponse
        self._request = pb.GenerateStreamRequest(
            model=job["model"],
            token_ids=pb.TokenIds(ids=request["prompt"]),
            sampling=pb.SamplingParams(max_tokens=request["max_tokens"], temperature=0.0, ignore_eos=True),
            options=pb.RequestOptions(cache_salt=job["cache_salt"]),
        ).SerializeToString()
        self.started = 0.0
        self.arrived: Arrived = []

    async def run(self) -> None:
        self.started = time.perf_counter()
        async for message in self._method(self._request):
            self.arrived.append((time.perf_counter(), message))

    def report(self) -> dict[str, Any]:
        messages = [(moment, self._response.FromString(data)) for moment, data in self.arrived]
        events = [moment for moment, message in messages if any(choice.text for choice in message.choices)]
        if not messages or not messages[-1][1].HasField("usage"):
            raise SystemExit("a stream ended before its last message")
        usage = messages[-1][1].usage
        return _report(self.started, events, usage.completion_tokens, usage.cached_tokens)


@dataclass(frozen=True)
class Run:
    """began, ended: time.perf_counter() seconds. cpu: seconds of this process in between."""

    began: float
    ended: float
    cpu: float
    streams: list[Stream]


async def run(job: dict[str, Any]) -> Run:
    if job["protocol"] == "rest":
        return await _run(job, [RestStream(job, request) for request in job["requests"]])
    import grpc

    async with grpc.aio.insecure_channel(f"{job['host']}:{job['port']}") as channel:
        await channel.channel_ready()
        method = channel.unary_stream("/jaxserve.v1.Inference/GenerateStream")  # bytes in, bytes out
        return await _run(job, [GrpcStream(method, job, request) for request in job["requests"]])


async def _run(job: dict[str, Any], streams: list[Any]) -> Run:
    gc.collect()
    gc.freeze()
    began, cpu = time.perf_counter(), time.process_time()
    if job["sequential"]:
        for stream in streams:
            await stream.run()
    else:
        await asyncio.gather(*(stream.run() for stream in streams))
    return Run(began, time.perf_counter(), time.process_time() - cpu, streams)


def _report(started: float, events: list[float], output_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {"started": started, "events": events, "output_tokens": output_tokens, "cached_tokens": cached_tokens}


def main() -> None:
    job = json.load(sys.stdin)
    done = uvloop.run(run(job))
    reports = [stream.report() for stream in done.streams]
    for report, request in zip(reports, job["requests"], strict=True):
        if report["output_tokens"] != request["max_tokens"]:
            raise SystemExit(f"{report['output_tokens']} tokens came, {request['max_tokens']} were asked for")
        report["started"] -= done.began
        report["events"] = [moment - done.began for moment in report["events"]]
    json.dump({"wall_s": done.ended - done.began, "client_cpu_s": done.cpu, "streams": reports}, sys.stdout)


if __name__ == "__main__":
    main()
