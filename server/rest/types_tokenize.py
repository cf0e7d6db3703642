"""The bodies of POST /tokenize and /detokenize, and what they answer with."""

from typing import Any

from pydantic import BaseModel, Field

from server.rest.types_chat import ChatMessage
from server.rest.types_misc import RequestBody, TokenId


class TokenizeRequest(RequestBody):
    """Either `prompt`, or `messages` and what goes with a conversation, as in /v1/chat/completions."""

    model: str | None = Field(None, description="A name of /v1/models; null is the one model this server runs.")
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Put the model's special tokens round the prompt [true, messages: false]."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Of messages: end with the header of the answer [true, unless continue_final_message]."
    )
    continue_final_message: bool | None = Field(None, description="Of messages: leave the last one open [false].")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Of messages: variables of the template.")
    return_token_strs: bool | None = Field(None, description="Also answer with the text of each token [false].")


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    model: str | None = None
    tokens: list[TokenId]


class DetokenizeResponse(BaseModel):
    prompt: str
