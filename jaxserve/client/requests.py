"""Arguments of a client's methods in, messages of jaxserve.v1 out. What cannot be sent raises InvalidRequestError."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from google.protobuf.message import Message

from jaxserve.client.options import ChatOptions, Messages, Options, Prompt, Terms, TokenizeOptions
from jaxserve.errors import InvalidRequestError
from jaxserve.request import SamplingParams
from jaxserve.v1 import inference_pb2 as pb

Asked = TypeVar("Asked", pb.GenerateRequest, pb.GenerateStreamRequest, pb.ChatRequest, pb.ChatStreamRequest)

TERMS = frozenset(Terms.__annotations__)
SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
OPTION_FIELDS = frozenset(pb.RequestOptions.DESCRIPTOR.fields_by_name)
CHAT_FIELDS = frozenset(ChatOptions.__annotations__.keys() - Options.__annotations__.keys())
TRUNCATION_SIDES = {"left": pb.TRUNCATION_SIDE_LEFT, "right": pb.TRUNCATION_SIDE_RIGHT}


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Makes one client's messages.

    model     asked for by calls that name none; "" = the one there is
    timeout   seconds of calls that name none; None = no limit
    api_key   sent with every call; None = none is
    """

    model: str
    timeout: float | None
    api_key: str | None

    def terms(self, given: Terms) -> dict[str, Any]:
        """timeout and metadata, as arguments of a gRPC call."""
        metadata = [] if self.api_key is None else [("authorization", f"Bearer {self.api_key}")]
        if "request_id" in given:
            metadata.append(("x-request-id", given["request_id"]))
        return {"timeout": given.get("timeout", self.timeout), "metadata": tuple(metadata)}

    def generate(self, kind: type[Asked], prompt: Prompt, params: SamplingParams | None, options: Options) -> Asked:
        """kind: GenerateRequest or GenerateStreamRequest."""
        return self._request(kind, _prompt(prompt), params, options)

    def chat(self, kind: type[Asked], messages: Messages, params: SamplingParams | None, options: ChatOptions) -> Asked:
        """kind: ChatRequest or ChatStreamRequest."""
        about = {name: value for name, value in options.items() if name in CHAT_FIELDS}
        rest: Any = {name: value for name, value in options.items() if name not in CHAT_FIELDS}
        return self._request(kind, {"messages": _messages(messages), **about}, params, rest)

    def tokenize(self, prompt: str | Messages, options: TokenizeOptions) -> pb.TokenizeRequest:
        about = {
            "return_token_strs" if name == "return_texts" else name: value
            for name, value in options.items()
            if name not in TERMS
        }
        return self._build(pb.TokenizeRequest, options, **_prompt(prompt), **about)

    def detokenize(self, token_ids: Iterable[int], terms: Terms) -> pb.DetokenizeRequest:
        return self._build(pb.DetokenizeRequest, terms, token_ids=token_ids)

    def model_of(self, terms: Terms) -> pb.GetModelRequest:
        return self._build(pb.GetModelRequest, terms)

    def _request(
        self, kind: type[Asked], about: Mapping[str, Any], params: SamplingParams | None, options: Options
    ) -> Asked:
        if unknown := sorted(options.keys() - {*TERMS, *SAMPLING_FIELDS, *OPTION_FIELDS}):
            raise InvalidRequestError(f"{unknown[0]} is no option of this call", unknown[0])
        sampling = {name: value for name, value in options.items() if name in SAMPLING_FIELDS}
        treatment = {name: value for name, value in options.items() if name in OPTION_FIELDS}
        if "truncation_side" in treatment:
            treatment["truncation_side"] = _side(treatment["truncation_side"])
        return self._build(
            kind, options, sampling=_sampling(params, sampling), options=_build(pb.RequestOptions, **treatment), **about
        )

    def _build(self, kind: type[Any], terms: Mapping[str, Any], **values: Any) -> Any:
        return _build(kind, model=terms.get("model", self.model), **values)


def _sampling(params: SamplingParams | None, given: dict[str, Any]) -> pb.SamplingParams:
    """params is sent whole, with `given` over it; without params only what is given. Checked here already."""
    whole = {} if params is None else {name: getattr(params, name) for name in SAMPLING_FIELDS}
    checked = SamplingParams(**{"max_tokens": None, **whole, **given})
    wanted = {name: getattr(checked, name) for name in whole | given}
    if wanted.get("allowed_token_ids") is not None:
        wanted["allowed_token_ids"] = {"ids": wanted["allowed_token_ids"]}
    return _build(pb.SamplingParams, **wanted)


def _prompt(prompt: Any) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Iterable):
        raise InvalidRequestError(f"prompt={prompt!r} must be text, token ids or messages", "prompt", prompt)
    items = list(prompt)
    if items and isinstance(items[0], Mapping):
        return {"messages": pb.Messages(messages=_messages(items))}
    return {"token_ids": {"ids": items}}


def _messages(messages: Messages) -> list[pb.Message]:
    known = pb.Message.DESCRIPTOR.fields_by_name
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.keys() - known.keys():
            raise InvalidRequestError(f"messages[{position}] must have {', '.join(known)} and nothing else", "messages")
    return [_build(pb.Message, **message) for message in messages]


def _side(side: Any) -> int:
    if side not in TRUNCATION_SIDES:
        raise InvalidRequestError(f"truncation_side={side!r} must be left or right", "truncation_side", side)
    return TRUNCATION_SIDES[side]


def _build(kind: type[Any], **values: Any) -> Any:
    """A message; raises InvalidRequestError naming the field whose value has no place in it. None = not set."""
    message: Message = kind()
    for name, value in values.items():
        if value is None:
            continue
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequestError(f"{name} cannot be sent: {error}", name, value) from None
    return message
