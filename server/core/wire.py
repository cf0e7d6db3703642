"""Requests and token outputs as the messages of `protos/jaxserve/internal/v1/tokens.proto`, and back, without loss.

Instants cross as ages or as instants of the sender's clock with the time of sending, so the two ends may be two hosts.
"""

import time
from typing import Any

from jaxserve.internal.v1 import tokens_pb2 as pb
from jaxserve.request import (
    FinishReason,
    Request,
    SampleProgress,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from jaxserve.v1 import inference_pb2 as public

# What the core needs of SamplingParams; stop strings and text options stay at the front end.
SCALARS = (
    "n",
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "ignore_eos",
    "logprobs",
    "prompt_logprobs",
)
MAX_TOP_K = 2**31 - 1  # more tokens than any vocabulary has
MAX_COUNT = 2**32 - 1  # more tokens than any context holds


def request_to_wire(request: Request, now: float) -> pb.EngineRequest:
    """now: time.monotonic() seconds."""
    message = pb.EngineRequest(
        id=request.id,
        prompt_token_ids=request.prompt_token_ids,
        params=_params_to_wire(request.params),
        eos_token_ids=request.eos_token_ids,
        bad_words=[public.TokenIds(ids=word) for word in request.bad_word_token_ids],
        cache_salt=request.cache_salt,
        priority=request.priority,
        age_seconds=now - request.arrival_time,
        progress=[pb.SampleProgress(token_ids=p.token_ids, finished=p.finished) for p in request.progress],
        prompt_logprobs_sent=request.prompt_logprobs_sent,
    )
    if request.deadline is not None:
        message.timeout_seconds = request.deadline - now
    return message


def request_from_wire(message: pb.EngineRequest) -> Request:
    now = time.monotonic()
    return Request(
        id=message.id,
        prompt_token_ids=list(message.prompt_token_ids),
        params=_params_from_wire(message.params),
        eos_token_ids=tuple(message.eos_token_ids),
        bad_word_token_ids=tuple(tuple(word.ids) for word in message.bad_words),
        cache_salt=message.cache_salt,
        priority=message.priority,
        arrival_time=now - message.age_seconds,
        deadline=now + message.timeout_seconds if message.HasField("timeout_seconds") else None,
        progress=tuple(SampleProgress(tuple(p.token_ids), p.finished) for p in message.progress),
        prompt_logprobs_sent=message.prompt_logprobs_sent,
    )


def output_to_wire(output: TokenOutput) -> pb.SampleOutput:
    message = pb.SampleOutput(
        request_id=output.request_id,
        index=output.index,
        token_ids=output.token_ids,
        finish_reason=output.finish_reason or "",
        cached_tokens=output.cached_tokens,
        preemptions=output.preemptions,
        scheduled_time=output.scheduled_time,
    )
    if output.logprobs:
        message.logprobs.extend(map(_logprobs_to_wire, output.logprobs))
    if output.prompt_logprobs:
        message.prompt_logprobs.extend(map(_logprobs_to_wire, output.prompt_logprobs))
    if isinstance(output.stop_reason, int):
        message.stop_token_id = output.stop_reason
    elif output.stop_reason is not None:
        message.stop_text = output.stop_reason
    return message


def output_from_wire(message: pb.SampleOutput, clock_offset: float) -> TokenOutput:
    """clock_offset: seconds to add to an instant of the sender."""
    kind = message.WhichOneof("stop_reason")
    finish: Any = message.finish_reason or None
    finish_reason: FinishReason | None = finish
    return TokenOutput(
        request_id=message.request_id,
        index=message.index,
        token_ids=list(message.token_ids),
        logprobs=[*map(_logprobs_from_wire, message.logprobs)] or None,
        prompt_logprobs=[*map(_logprobs_from_wire, message.prompt_logprobs)] or None,
        finish_reason=finish_reason,
        stop_reason=None if kind is None else getattr(message, kind),
        cached_tokens=message.cached_tokens,
        preemptions=message.preemptions,
        scheduled_time=message.scheduled_time + clock_offset if message.HasField("scheduled_time") else None,
    )


def _params_to_wire(params: SamplingParams) -> public.SamplingParams:
    values = {name: getattr(params, name) for name in SCALARS}
    for name in ("max_tokens", "min_tokens"):
        values[name] = None if values[name] is None else min(values[name], MAX_COUNT)
    message = public.SamplingParams(
        **values,
        top_k=min(params.top_k, MAX_TOP_K),
        stop_token_ids=params.stop_token_ids or (),
        logit_bias=params.logit_bias or {},
    )
    if params.allowed_token_ids is not None:
        message.allowed_token_ids.ids.extend(params.allowed_token_ids)
    return message


def _params_from_wire(message: public.SamplingParams) -> SamplingParams:
    values: dict[str, Any] = {name: getattr(message, name) if message.HasField(name) else None for name in SCALARS}
    return SamplingParams(
        **values,
        top_k=message.top_k,
        stop_token_ids=tuple(message.stop_token_ids),
        logit_bias=dict(message.logit_bias) or None,
        allowed_token_ids=tuple(message.allowed_token_ids.ids) if message.HasField("allowed_token_ids") else None,
    )


def _logprobs_to_wire(entry: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        top_ids=entry.top_ids,
        top_logprobs=entry.top_logprobs,
    )


def _logprobs_from_wire(message: pb.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        message.token_id, message.logprob, message.rank, list(message.top_ids), list(message.top_logprobs)
    )
