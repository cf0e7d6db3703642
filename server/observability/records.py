"""What is noted about requests, and by whom: the hooks a front end calls, and one record a finished request leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from jaxserve.request import RequestMetrics

if TYPE_CHECKING:  # it brings the tokenizer, which processes that only write logs do without
    from jaxserve.engine.assembler import RequestAssembler


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One finished request. Instants are time.monotonic() seconds, durations seconds. Never holds text of a prompt."""

    request_id: str  # ours
    client_request_id: str  # X-Request-Id, sanitised; ours where none was sent
    endpoint: str  # "/v1/completions", "Inference/GenerateStream"
    model: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int  # of all samples
    max_generated_tokens: int  # of the longest sample
    n: int
    max_tokens: int | None
    finish_reasons: tuple[str, ...]  # of each sample; "" = unfinished
    error_code: str | None  # of server.errors.CODES; "cancelled" = the client went away
    metrics: RequestMetrics
    finished_time: float  # when its last token came; of one that was cut short, when that was
    traceparent: str | None  # W3C trace context the client sent

    @property
    def e2e_time(self) -> float:
        """Arrival to end."""
        return self.finished_time - self.metrics.arrival_time

    @property
    def prefill_time(self) -> float | None:
        """First scheduled to first token; None = one of them never was."""
        return _between(self.metrics.scheduled_time, self.metrics.first_token_time)

    @property
    def decode_time(self) -> float | None:
        """First token to last token."""
        return _between(self.metrics.first_token_time, self.metrics.last_token_time)

    @property
    def inference_time(self) -> float | None:
        """First scheduled to last token."""
        return _between(self.metrics.scheduled_time, self.metrics.last_token_time)


RecordListener = Callable[[RequestRecord], None]  # must not block


class CallContext(Protocol):
    """What of a call its records name; `CallOptions` has it."""

    @property
    def endpoint(self) -> str: ...
    @property
    def client_request_id(self) -> str: ...
    @property
    def traceparent(self) -> str | None: ...


class RequestObserver(Protocol):
    """Called on the event loop; must not block."""

    def begin(self, request_id: str, call: CallContext) -> None:
        """A request was accepted; `finished` will be called for it."""
        ...

    def tokens(self, assembler: "RequestAssembler", index: int, count: int, now: float) -> None:
        """`count` new tokens of one sample arrived, and the assembler has taken them in."""
        ...

    def finished(self, assembler: "RequestAssembler", now: float, error_code: str | None) -> None:
        """A request ended, however it did; called once."""
        ...

    def rejected(self, code: str) -> None:
        """A call was refused before any request of it was accepted. code: of server.errors.CODES."""
        ...


def request_record(
    assembler: "RequestAssembler", call: CallContext, model: str, now: float, error_code: str | None
) -> RequestRecord:
    """What `assembler` has seen by the end of its request, at time.monotonic() seconds `now`.

    A client that is slow to read does not make a finished request last longer, and what befell the other requests of
    its call does not make it fail.
    """
    complete = all(reason in ("stop", "length") for reason in assembler.finish_reasons)
    request, generated = assembler.request, assembler.num_generated_tokens
    last_token = assembler.metrics.last_token_time
    return RequestRecord(
        request_id=request.id,
        client_request_id=call.client_request_id or request.id,
        endpoint=call.endpoint,
        model=model,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_cached_tokens=assembler.metrics.cached_tokens,
        num_generated_tokens=sum(generated),
        max_generated_tokens=max(generated),
        n=request.params.n,
        max_tokens=request.params.max_tokens,
        finish_reasons=tuple(reason or "" for reason in assembler.finish_reasons),
        error_code=None if complete else error_code,
        metrics=assembler.metrics,
        finished_time=last_token if assembler.finished and last_token is not None else now,
        traceparent=call.traceparent,
    )


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)
