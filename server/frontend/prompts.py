"""What a call asks with: prompts, and how their requests are treated; the checks both protocols need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.errors import InvalidRequestError
from server.errors import ServiceError

# Names that are no variables of a chat template: other fields set them, or they lead to the renderer itself.
RESERVED_VARIABLES = frozenset(
    {
        "self",
        "template",
        "tokenizer",
        "check",
        "messages",
        "tools",
        "add_generation_prompt",
        "add_special_tokens",
        "continue_final_message",
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
    }
)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Chat messages as a prompt; rendered through the model's chat template."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


Prompt = str | Sequence[int] | Conversation


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """How the requests of one call are treated.

    timeout                 seconds from now; None = settings.default_timeout
    add_special_tokens      None = True for text, False for conversations
    truncate_prompt_tokens  keep so many tokens; -1 = as many as the context holds
    endpoint                for records: "/v1/completions", "Inference/Generate"
    client_request_id       X-Request-Id as sanitised; "" = none was sent
    """

    endpoint: str
    priority: int = 0
    timeout: float | None = None
    cache_salt: str = ""
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str = "left"  # what is cut off: left | right
    client_request_id: str = ""
    traceparent: str | None = None


def check_variables(given: Mapping[str, Any]) -> None:
    """Raises ServiceError for a template variable that a request cannot set."""
    for name in given:
        where = f"chat_template_kwargs.{name[:100]}"
        if name == "chat_template":
            raise ServiceError(
                "unsupported_parameter",
                f"{where} is not supported: this server runs only its model's template",
                param=where,
            )
        if name in RESERVED_VARIABLES:
            raise ServiceError("invalid_value", f"{where} is not free: the server sets it", param=where)


def truncated(ids: list[int], options: CallOptions, max_model_len: int) -> list[int]:
    """The tokens of a prompt that are kept. Raises InvalidRequestError for a number that makes no sense."""
    keep = options.truncate_prompt_tokens
    if keep is None:
        return ids
    if keep < 1 and keep != -1:
        raise InvalidRequestError(
            f"truncate_prompt_tokens={keep} must be at least 1, or -1", "truncate_prompt_tokens", keep
        )
    keep = max_model_len - 1 if keep == -1 else keep
    if keep >= len(ids):
        return ids
    return ids[-keep:] if options.truncation_side == "left" else ids[:keep]
