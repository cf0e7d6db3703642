"""What the calls of a client return, made of the messages that come back.

Samples are the engine's own `CompletionOutput` and `RequestDelta`.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

from jaxserve.request import CompletionOutput, FinishReason, Logprob, RequestDelta
from jaxserve.v1 import inference_pb2 as pb

Sample = TypeVar("Sample", CompletionOutput, RequestDelta)
PositionLogprobs = dict[int, Logprob]  # token id -> its log probability; the chosen token first, then the likeliest

FINISH_REASONS: dict[int, FinishReason | None] = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_ABORT: "abort",
}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int  # of all samples
    total_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds, as the server saw them; None = the request never got there."""

    queue: float | None  # arrival -> first scheduled
    time_to_first_token: float | None  # arrival -> first token
    time_per_output_token: float | None  # mean gap after the first
    total: float  # arrival -> end
    preemptions: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole answer. id: what `abort` takes. created: Unix seconds."""

    id: str
    model: str
    created: int
    outputs: tuple[CompletionOutput, ...]  # one per sample
    usage: Usage
    timings: Timings
    prompt_token_ids: tuple[int, ...]  # empty unless return_prompt_token_ids
    prompt_logprobs: tuple[PositionLogprobs, ...]  # one per prompt token but the first; empty unless asked for

    @property
    def text(self) -> str:
        """Of the first sample."""
        return self.outputs[0].text


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What is new in an answer that streams. usage and what follows it come with the last chunk only."""

    id: str
    model: str
    created: int
    deltas: tuple[RequestDelta, ...]  # of those samples that have something new
    prompt_token_ids: tuple[int, ...]  # in the first chunk, where asked for
    usage: Usage | None
    timings: Timings | None
    prompt_logprobs: tuple[PositionLogprobs, ...]

    @property
    def text(self) -> str:
        """What is new in the first sample."""
        return "".join(delta.text for delta in self.deltas if delta.index == 0)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A prompt as the model sees it. texts: of each token, empty unless asked for."""

    ids: tuple[int, ...]
    max_model_len: int  # tokens of prompt and answer together
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Model:
    """created: Unix seconds. max_model_len: 0 until the engine was ready. root: what the server was started with."""

    id: str
    created: int
    owned_by: str
    max_model_len: int
    root: str


def completion(message: pb.GenerateResponse | pb.ChatResponse) -> Completion:
    return Completion(
        id=message.id,
        model=message.model,
        created=message.created,
        outputs=tuple(_with_sum(_sample(CompletionOutput, choice)) for choice in message.choices),
        usage=_usage(message.usage),
        timings=_timings(message.timings),
        prompt_token_ids=tuple(message.prompt_token_ids),
        prompt_logprobs=tuple(map(_position, message.prompt_logprobs)),
    )


def chunk(message: pb.GenerateStreamResponse | pb.ChatStreamResponse) -> Chunk:
    return Chunk(
        id=message.id,
        model=message.model,
        created=message.created,
        deltas=tuple(_sample(RequestDelta, choice) for choice in message.choices),
        prompt_token_ids=tuple(message.prompt_token_ids),
        usage=_usage(message.usage) if message.HasField("usage") else None,
        timings=_timings(message.timings) if message.HasField("timings") else None,
        prompt_logprobs=tuple(map(_position, message.prompt_logprobs)),
    )


def tokens(message: pb.TokenizeResponse) -> Tokens:
    return Tokens(ids=tuple(message.token_ids), max_model_len=message.max_model_len, texts=tuple(message.token_strs))


def model(message: pb.Model) -> Model:
    return Model(
        id=message.id,
        created=message.created,
        owned_by=message.owned_by,
        max_model_len=message.max_model_len,
        root=message.root,
    )


def _sample(kind: type[Sample], choice: pb.Choice) -> Sample:
    stop_reason = choice.WhichOneof("stop_reason")
    return kind(
        index=choice.index,
        text=choice.text,
        token_ids=list(choice.token_ids),
        logprobs=[_position(position) for position in choice.logprobs] or None,
        finish_reason=FINISH_REASONS[choice.finish_reason],
        stop_reason=None if stop_reason is None else getattr(choice, stop_reason),
    )


def _with_sum(output: CompletionOutput) -> CompletionOutput:
    if output.logprobs is not None:
        chosen = (next(iter(position.values())).logprob for position in output.logprobs)
        output.cumulative_logprob = math.fsum(chosen)
    return output


def _position(message: pb.PositionLogprobs) -> PositionLogprobs:
    return {
        token.token_id: Logprob(token.logprob, token.rank or None, token.token)
        for token in (message.chosen, *message.top)
    }


def _usage(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        total_tokens=message.total_tokens,
        cached_tokens=message.cached_tokens,
    )


def _timings(message: pb.Timings) -> Timings:
    def reached(name: str) -> float | None:
        return getattr(message, name) if message.HasField(name) else None

    return Timings(
        queue=reached("queue_seconds"),
        time_to_first_token=reached("time_to_first_token_seconds"),
        time_per_output_token=reached("time_per_output_token_seconds"),
        total=message.total_seconds,
        preemptions=message.preemptions,
    )
