"""One call of a generation route, from validated parameters to JSON: what both routes and both ways to answer share.

A route gives a `Form` (how choices of its kind are written); `whole` makes one object of it, `chunks` a stream of them.
"""

import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic_core import to_json

import jaxserve
from jaxserve.request import RequestDelta, RequestMetrics, RequestOutput, SamplingParams
from server.frontend.frontend import CallOptions, Frontend, Prompt
from server.frontend.generation import Deltas, Generation
from server.rest.sse import DONE
from server.rest.types_common import GenerationRequest


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is generated, and what is told about it."""

    frontend: Frontend
    prompts: Sequence[Prompt]
    params: SamplingParams
    options: CallOptions
    model: str  # the name to answer with
    body: GenerationRequest
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds

    async def start(self, names: AbstractContextManager[None]) -> Generation:
        """names: see `params.spelled`."""
        with names:
            return await self.frontend.generate(self.prompts, self.params, self.options)


class Form(Protocol):
    """How the choices of one call are written. Made for one call; used for one answer."""

    @property
    def call(self) -> Call: ...

    id_prefix: str
    objects: tuple[str, str]  # of a whole answer, of a chunk

    def names(self) -> AbstractContextManager[None]:
        """Errors inside name fields as this route calls them."""
        ...

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """`choices`, and what stands beside them."""
        ...

    def begin(self, generation: Generation) -> None:
        """A stream of it begins."""
        ...

    def add(self, position: int, delta: RequestDelta) -> list[dict[str, Any]]:
        """What is new in one choice -> chunks: for each one its `choices`, and what stands beside them."""
        ...


async def whole(form: Form) -> dict[str, Any]:
    """The answer as one object. Raises ServiceError."""
    call = form.call
    async with await call.start(form.names()) as generation:
        outputs = await generation.outputs()
        answer = _head(form, generation, form.objects[0]) | form.whole(outputs)
        num_generated = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        answer["usage"] = _usage(generation, num_generated)
        if call.body.return_timings:
            answer["timings"] = timings(generation.metrics)
        return answer


async def chunks(form: Form) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events, at most one chunk per choice each time. Raises ServiceError."""
    call = form.call
    options = call.body.stream_options
    usage_at_end = options is not None and bool(options.include_usage)
    usage_always = options is not None and bool(options.continuous_usage_stats)
    num_generated = 0
    async with await call.start(form.names()) as generation:
        head = _head(form, generation, form.objects[1])
        if usage_at_end:
            head["usage"] = None
        form.begin(generation)
        async for batch in generation.deltas():
            parts = []
            for position, delta in merged(batch):
                num_generated += len(delta.token_ids)
                parts += form.add(position, delta)
            if usage_always:
                head["usage"] = _usage(generation, num_generated)
            if parts:
                yield b"".join([event(head | part) for part in parts])
        last: dict[str, Any] = {}
        if usage_at_end:
            last["usage"] = _usage(generation, num_generated)
        if call.body.return_timings:
            last["timings"] = timings(generation.metrics)
        yield (event(head | {"choices": []} | last) if last else b"") + DONE


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(content) + b"\n\n"


def merged(batch: Deltas) -> Deltas:
    """One delta for each sample of the batch, in the order in which they first appear."""
    together: dict[tuple[int, int], list[RequestDelta]] = {}
    for position, delta in batch:
        together.setdefault((position, delta.index), []).append(delta)
    if len(together) == len(batch):
        return batch
    return [(position, _joined(deltas)) for (position, _), deltas in together.items()]


def finish_reason(reason: str | None) -> str | None:
    """Ours -> OpenAI's, which has no word for a request that was aborted; its stop_reason is "aborted"."""
    return "stop" if reason == "abort" else reason


def timings(metrics: Sequence[RequestMetrics]) -> dict[str, Any]:
    """Seconds; of several prompts the longest."""

    def longest(values: list[float | None]) -> float | None:
        return max((value for value in values if value is not None), default=None)

    totals = [None if m.last_token_time is None else m.last_token_time - m.arrival_time for m in metrics]
    return {
        "queue_seconds": longest([m.queue_time for m in metrics]),
        "time_to_first_token_seconds": longest([m.time_to_first_token for m in metrics]),
        "time_per_output_token_seconds": longest([m.time_per_output_token for m in metrics]),
        "total_seconds": longest(totals),
        "preemptions": sum(m.preemptions for m in metrics),
    }


def fingerprint(frontend: Frontend) -> str:
    """The same as long as nothing changed that may change what a seed generates."""
    info = frontend.engine.info
    assert info is not None  # it accepted a request
    parts = (jaxserve.__version__, frontend.model_root, info.device, info.dtype, info.num_devices, info.limits)
    return f"fp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:10]}"


def _head(form: Form, generation: Generation, kind: str) -> dict[str, Any]:
    call = form.call
    return {
        "id": form.id_prefix + generation.requests[0].id.rpartition("-")[2],
        "object": kind,
        "created": call.created,
        "model": call.model,
        "system_fingerprint": fingerprint(call.frontend),
    }


def _usage(generation: Generation, num_generated: int) -> dict[str, Any]:
    num_prompt = sum(len(request.prompt_token_ids) for request in generation.requests)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(metrics.cached_tokens for metrics in generation.metrics)},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _joined(deltas: list[RequestDelta]) -> RequestDelta:
    last = deltas[-1]
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return RequestDelta(
        index=last.index,
        text="".join([delta.text for delta in deltas]),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        logprobs=None if last.logprobs is None else logprobs,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
