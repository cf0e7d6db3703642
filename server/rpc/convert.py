"""Messages of jaxserve.v1 in, the front end's own types out, and back."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from jaxserve.errors import InvalidRequestError
from jaxserve.request import CompletionOutput, Logprob, RequestDelta, RequestOutput, SamplingParams
from jaxserve.v1 import inference_pb2 as pb
from server.errors import ServiceError
from server.frontend.frontend import CallOptions, Conversation, Prompt

LogprobDicts = Sequence[Mapping[int, Logprob]]
GenerateMessage = pb.GenerateRequest | pb.GenerateStreamRequest
ChatMessage = pb.ChatRequest | pb.ChatStreamRequest

FINISH_REASONS: dict[str | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}
TRUNCATION_SIDES = {
    pb.TRUNCATION_SIDE_UNSPECIFIED: "left",
    pb.TRUNCATION_SIDE_LEFT: "left",
    pb.TRUNCATION_SIDE_RIGHT: "right",
}
# Where a field of the front end's types lies in a request message, if not at its top under the same name.
FIELD_PATHS = {field: f"sampling.{field}" for field in pb.SamplingParams.DESCRIPTOR.fields_by_name}
FIELD_PATHS |= {field: f"options.{field}" for field in pb.RequestOptions.DESCRIPTOR.fields_by_name}
FIELD_PATHS |= {"tokens": "token_ids"}


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is known of an RPC beside its message.

    endpoint     "Inference/Generate"
    request_id   x-request-id, the client's or ours
    timeout      seconds until the client's deadline; None = it set none
    traceparent  W3C trace context, None = none was sent
    """

    endpoint: str
    request_id: str
    timeout: float | None = None
    traceparent: str | None = None


def given_sampling(message: pb.SamplingParams) -> dict[str, Any]:
    """The fields that were set, as arguments of `SamplingParams`. An unset max_tokens is "up to the context"."""
    given: dict[str, Any] = {"max_tokens": None}
    for field, value in message.ListFields():
        if field.name == "allowed_token_ids":
            given[field.name] = list(value.ids)
        elif field.name == "logit_bias":
            given[field.name] = dict(value)
        else:
            given[field.name] = list(value) if field.is_repeated else value
    return given


def generate_prompt(message: GenerateMessage | pb.TokenizeRequest) -> Prompt:
    """Raises ServiceError where none is set."""
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return list(message.token_ids.ids)
        case "messages":
            return Conversation(messages=chat_messages(message.messages.messages))
    kinds = ", ".join(field.name for field in message.DESCRIPTOR.oneofs_by_name["prompt"].fields)
    raise ServiceError("missing_required_parameter", f"prompt is not set; give one of {kinds}", param="prompt")


def conversation(message: ChatMessage | pb.TokenizeRequest, messages: Sequence[pb.Message]) -> Conversation:
    """messages: where `message` keeps them. Raises InvalidRequestError for template variables JSON cannot carry."""
    continues = message.continue_final_message
    opens = message.add_generation_prompt if message.HasField("add_generation_prompt") else not continues
    return Conversation(
        messages=chat_messages(messages),
        add_generation_prompt=opens,
        continue_final_message=continues,
        template_kwargs=template_kwargs(message.chat_template_kwargs),
    )


def chat_messages(messages: Sequence[pb.Message]) -> list[dict[str, str]]:
    """As chat templates know them, which have no developer. A name only where one is set."""
    chat = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        entry = {"role": role, "content": message.content}
        chat.append(entry | {"name": message.name} if message.HasField("name") else entry)
    return chat


def template_kwargs(message: Struct) -> dict[str, Any]:
    """Raises InvalidRequestError for numbers JSON has none for."""
    try:
        return _whole_numbers(json_format.MessageToDict(message))
    except ValueError as error:
        raise InvalidRequestError(f"chat_template_kwargs are not JSON: {error}", "chat_template_kwargs") from None


def call_options(message: pb.RequestOptions, call: Call) -> CallOptions:
    """Raises ServiceError where the client's deadline has passed or a value is none the front end knows."""
    if call.timeout is not None and not call.timeout > 0:
        raise ServiceError("deadline_exceeded", "the deadline passed before the request was read")
    if message.truncation_side not in TRUNCATION_SIDES:
        raise ServiceError(
            "invalid_value", f"truncation_side={message.truncation_side} is not known", param="truncation_side"
        )
    keep = message.truncate_prompt_tokens if message.HasField("truncate_prompt_tokens") else None
    return CallOptions(
        endpoint=call.endpoint,
        priority=message.priority,
        timeout=call.timeout,
        cache_salt=message.cache_salt,
        add_special_tokens=message.add_special_tokens if message.HasField("add_special_tokens") else None,
        truncate_prompt_tokens=keep,
        truncation_side=TRUNCATION_SIDES[message.truncation_side],
        client_request_id=call.request_id,
        traceparent=call.traceparent,
    )


def choice(output: CompletionOutput | RequestDelta, params: SamplingParams) -> pb.Choice:
    """One sample, or what is new in it. params: what it was asked with."""
    message = pb.Choice(
        index=output.index,
        text=clean(output.text),
        token_ids=output.token_ids,
        finish_reason=FINISH_REASONS[output.finish_reason],
    )
    if output.logprobs is not None and params.logprobs is not None:
        message.logprobs.extend(positions(output.logprobs, params.logprobs))
    if isinstance(output.stop_reason, int):
        message.stop_token_id = output.stop_reason
    elif output.stop_reason is not None and output.finish_reason == "stop":
        message.stop_string = clean(output.stop_reason)
    return message


def choices(deltas: Sequence[RequestDelta], params: SamplingParams) -> list[pb.Choice]:
    """One for each sample that has something new; the deltas of a sample are in order."""
    merged: dict[int, pb.Choice] = {}
    for delta in deltas:
        new = choice(delta, params)
        if (old := merged.setdefault(delta.index, new)) is not new:
            new.text = old.text + new.text
            old.MergeFrom(new)
    return list(merged.values())


def positions(entries: LogprobDicts, num_top: int) -> list[pb.PositionLogprobs]:
    """entries: at each position the chosen token, then the likeliest others. num_top: how many of those were wanted."""
    return [_position(entry, num_top) for entry in entries]


def usage(output: RequestOutput) -> pb.Usage:
    prompt = len(output.prompt_token_ids)
    generated = sum(len(sample.token_ids) for sample in output.outputs)
    return pb.Usage(
        prompt_tokens=prompt,
        completion_tokens=generated,
        total_tokens=prompt + generated,
        cached_tokens=output.num_cached_tokens,
    )


def timings(output: RequestOutput) -> pb.Timings:
    """Of a request that ends now."""
    metrics = output.metrics
    return pb.Timings(
        queue_seconds=metrics.queue_time,
        time_to_first_token_seconds=metrics.time_to_first_token,
        time_per_output_token_seconds=metrics.time_per_output_token,
        total_seconds=time.monotonic() - metrics.arrival_time,
        preemptions=metrics.preemptions,
    )


def prompt_logprobs(output: RequestOutput, params: SamplingParams) -> list[pb.PositionLogprobs]:
    """Empty where none were asked for."""
    if output.prompt_logprobs is None or params.prompt_logprobs is None:
        return []
    return positions([entry for entry in output.prompt_logprobs if entry is not None], params.prompt_logprobs)


def clean(text: str) -> str:
    """protobuf refuses lone surrogates, which a tokenizer may hold."""
    return text.encode("utf-8", "replace").decode()


def _position(entry: Mapping[int, Logprob], num_top: int) -> pb.PositionLogprobs:
    chosen, *others = (
        pb.TokenLogprob(
            token_id=token, logprob=found.logprob, rank=found.rank or 0, token=clean(found.decoded_token or "")
        )
        for token, found in entry.items()
    )
    # The chosen token is one of the likeliest exactly where no further entry had to be added for it.
    top = sorted((chosen, *others), key=lambda token: token.rank) if len(entry) <= num_top else others
    return pb.PositionLogprobs(chosen=chosen, top=top)


def _whole_numbers(value: Any) -> Any:
    """Struct knows doubles only, but a template that prints a number which was sent as 3 shall not print 3.0."""
    match value:
        case dict():
            return {key: _whole_numbers(entry) for key, entry in value.items()}
        case list():
            return [_whole_numbers(entry) for entry in value]
        case float() if value.is_integer():
            return int(value)
    return value
