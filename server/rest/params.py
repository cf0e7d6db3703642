"""The parameters of both generation routes: a parsed body in, arguments of `SamplingParams` and `CallOptions` out.

What jaxserve does not do is refused here, with the reason; nothing a client sends is silently without effect.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.text.chat_template import checked_messages
from server.errors import ServiceError, service_error
from server.frontend.frontend import Conversation
from server.rest.types_chat import ChatMessage, ChatRequest
from server.rest.types_common import GenerationRequest, Refused, StreamOptions
from server.rest.types_completion import CompletionRequest
from server.rest.types_misc import RequestBody

MAX_PROMPTS = 1024  # of one call
MAX_CHOICES = 1024  # prompts times n
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
REFUSED: dict[type[RequestBody], list[tuple[str, str]]] = {  # (field, why) of each body
    type_: [
        (name, mark.why)
        for name, field in type_.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Refused)
    ]
    for type_ in (CompletionRequest, ChatRequest, ChatMessage, StreamOptions)
}


def completion_sampling(body: CompletionRequest) -> dict[str, Any]:
    """Arguments for `SamplingParams`. Raises ServiceError for what is not supported or contradicts itself."""
    _check(body)
    given = _sampling(body)
    given["max_tokens"] = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise _unsupported("best_of", f"best_of={body.best_of} must equal n={body.n or 1}: choices are not ranked")
    if body.logprobs is not None:
        given["logprobs"] = body.logprobs
        if body.echo:  # an echoed prompt is part of the choice's logprobs
            given["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    return given


def chat_sampling(body: ChatRequest) -> dict[str, Any]:
    """Arguments for `SamplingParams`. Raises ServiceError for what is not supported or contradicts itself."""
    _check(body)
    for name in ("tool_choice", "function_call"):
        if getattr(body, name) not in (None, "none"):
            raise _unsupported(name, f'{name} can only be "none": the model\'s tool calls are not parsed')
    if body.modalities not in (None, [], ["text"]):
        raise _unsupported("modalities", 'modalities can only be ["text"]: this model writes text only')
    given = _sampling(body)
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise _invalid("max_tokens", f"max_tokens={old} contradicts max_completion_tokens={new}; give one of them")
    given["max_tokens"] = new if old is None else old  # None: up to the context
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise _invalid("top_logprobs", f"top_logprobs={body.top_logprobs} needs logprobs=true")
    return given


def call_fields(body: GenerationRequest) -> dict[str, Any]:
    """Fields of `CallOptions`; None where the body says nothing."""
    return {
        "priority": body.priority,
        "cache_salt": body.cache_salt,
        "add_special_tokens": body.add_special_tokens,
        "truncate_prompt_tokens": body.truncate_prompt_tokens,
        "truncation_side": body.truncation_side,
    }


def prompts_of(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of one call, each text or token ids. Raises ServiceError: empty_prompt, invalid_value."""
    prompt: Any = body.prompt
    if isinstance(prompt, list) and not prompt:
        raise ServiceError("empty_prompt", "prompt is an empty list", param="prompt")
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if len(prompts) > MAX_PROMPTS:
        raise _invalid("prompt", f"prompt holds {len(prompts)} prompts; one call takes at most {MAX_PROMPTS}")
    if (choices := len(prompts) * (body.n or 1)) > MAX_CHOICES:
        raise _invalid("n", f"{len(prompts)} prompts times n={body.n} are {choices} choices, more than {MAX_CHOICES}")
    return prompts


def conversation_of(body: ChatRequest) -> Conversation:
    """The prompt of a chat call, every content one string.

    Raises ServiceError for parts that are not text and for reserved variables, InvalidRequestError for wrong messages.
    """
    for i, message in enumerate(body.messages):
        _refuse(message, f"messages[{i}].")
        _refuse_media(message, f"messages[{i}].content")
    if not body.messages:
        raise ServiceError("empty_prompt", "messages is an empty list", param="messages")
    open_end = bool(body.continue_final_message)
    return Conversation(
        messages=checked_messages([template_message(message) for message in body.messages]),
        add_generation_prompt=not open_end if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=open_end,
        template_kwargs=_template_variables(body),
    )


def template_message(message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates know it, without nulls. They have no developer, OpenAI's new word for system."""
    fields = message.model_dump(exclude_none=True, exclude={"annotations", "audio", "function_call"})
    if fields["role"] == "developer":
        fields["role"] = "system"
    return fields


def continued_text(conversation: Conversation) -> str:
    """The final message's text, where the model goes on with it."""
    return conversation.messages[-1].get("content", "") if conversation.continue_final_message else ""


@contextmanager
def spelled(names: Mapping[str, str]) -> Iterator[None]:
    """Errors raised inside name their field as the client spelled it. names: the engine's name -> the client's."""
    try:
        yield
    except InvalidRequestError as error:
        told = service_error(error)
        name = names.get(error.field, error.field)
        message = str(error)
        if message.startswith(f"{error.field}="):
            message = name + message.removeprefix(error.field)
        raise ServiceError(told.code, message, param=name, retry_after=told.retry_after) from error


def completion_names() -> dict[str, str]:
    return {"prompt_token_ids": "prompt"}


def chat_names(body: ChatRequest) -> dict[str, str]:
    names = {"prompt": "messages", "prompt_token_ids": "messages", "logprobs": "top_logprobs"}
    return names if body.max_completion_tokens is None else names | {"max_tokens": "max_completion_tokens"}


def _check(body: GenerationRequest) -> None:
    _refuse(body)
    if body.stream_options is not None:
        if not body.stream:
            raise _invalid("stream_options", "stream_options needs stream=true")
        _refuse(body.stream_options, "stream_options.")
    if body.stream and body.prompt_logprobs is not None:
        raise _unsupported("prompt_logprobs", "prompt_logprobs is not available with stream=true")
    if body.response_format is not None and body.response_format.type != "text":
        raise _unsupported(
            "response_format",
            f"response_format.type={body.response_format.type!r} is not supported: "
            "output cannot be constrained to JSON; only 'text' is",
        )


def _sampling(body: GenerationRequest) -> dict[str, Any]:
    return {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None}


def _refuse(body: RequestBody, prefix: str = "") -> None:
    for name, why in REFUSED[type(body)]:
        value = getattr(body, name)
        if value is not None and value is not False and value != [] and value != {}:
            raise _unsupported(prefix + name, f"{prefix}{name} is not supported: {why}")


def _refuse_media(message: ChatMessage, where: str) -> None:
    """Parts like {"type": "image_url", ...} get their own words; whatever else is wrong the chat template says."""
    parts: Sequence[Any] = message.content if isinstance(message.content, list) else ()
    for j, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise _unsupported(
                f"{where}[{j}]", f"{where}[{j}].type={kind[:40]!r} is not supported: this model reads text only"
            )


def _template_variables(body: ChatRequest) -> dict[str, Any]:
    given = body.chat_template_kwargs or {}
    own = {name: getattr(body, name) for name in ("reasoning_effort", "verbosity", "documents")}
    return {name: value for name, value in own.items() if value is not None} | given


def _unsupported(param: str, message: str) -> ServiceError:
    return ServiceError("unsupported_parameter", message, param=param)


def _invalid(param: str, message: str) -> ServiceError:
    return ServiceError("invalid_value", message, param=param)
