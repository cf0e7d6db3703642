"""The body of POST /v1/chat/completions and what it answers with."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from server.rest.types_common import GenerationRequest, Int32, PromptLogprob, Refused, Timings, Usage
from server.rest.types_misc import RequestBody

_NO_TOOLS = "the model's tool calls are not parsed"
_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}, {"type": "null"}]}


class ChatMessage(RequestBody):
    """Goes to the model's chat template as it is, but for what is said here."""

    role: Annotated[str, Field(min_length=1)] = Field(
        description="Any role the template knows: system, user, assistant, tool; developer becomes system."
    )
    content: Annotated[Any, WithJsonSchema(_CONTENT_SCHEMA)] = Field(
        None, description="Text, or a list of text parts; null for an assistant message with tool_calls."
    )
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    refusal: str | None = None
    # Clients send these back from an answer, as null.
    function_call: Annotated[Any, Refused("give tool_calls")] = None
    audio: Annotated[Any, Refused("this model reads text only")] = None
    annotations: Annotated[Any, Refused("this model reads text only")] = None


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(description="The conversation so far.")
    max_completion_tokens: Int32 | None = Field(None, description="Tokens to generate at most [up to the context].")
    max_tokens: Int32 | None = Field(None, description="The older name of max_completion_tokens.")
    logprobs: bool | None = Field(None, description="Log probabilities of each token.")
    top_logprobs: Int32 | None = Field(None, description="And of the k likeliest at each; only with logprobs=true.")
    reasoning_effort: str | None = Field(None, description="Handed to the chat template, as reasoning_effort.")
    verbosity: str | None = Field(None, description="Handed to the chat template, as verbosity.")
    add_generation_prompt: bool | None = Field(
        None, description="End the prompt with the header of the answer [true, unless continue_final_message]."
    )
    continue_final_message: bool | None = Field(None, description="The model goes on with the final message.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the chat template.")
    documents: list[dict[str, Any]] | None = Field(None, description="Handed to the chat template, as documents.")
    # Without effect here
    metadata: dict[str, Any] | None = Field(None, description="Accepted, not used and not stored.")
    store: Annotated[bool | None, Refused("answers are not stored")] = Field(None, description="Only false.")
    service_tier: Literal["auto", "default"] | None = Field(None, description='Answered with "default".')
    safety_identifier: str | None = Field(None, description="Accepted, not used and not stored.")
    prompt_cache_key: str | None = Field(None, description="Accepted: any equal prefix is found in the cache anyway.")
    prompt_cache_retention: Literal["in_memory"] | None = Field(None, description="The cache is in memory only.")
    prediction: dict[str, Any] | None = Field(None, description="Accepted: it would only make the same answer faster.")
    parallel_tool_calls: bool | None = Field(None, description="Accepted: there are no tool calls.")
    include_reasoning: bool | None = Field(None, description="Accepted: reasoning stays where it is, in the content.")
    modalities: list[str] | None = Field(None, description='Only ["text"].')
    tool_choice: Any = Field(None, description='Only "none".', json_schema_extra={"enum": ["none", None]})
    function_call: Any = Field(None, description='Only "none".', json_schema_extra={"enum": ["none", None]})
    # Not done
    tools: Annotated[Any, Refused(_NO_TOOLS)] = None
    functions: Annotated[Any, Refused(_NO_TOOLS)] = None
    audio: Annotated[Any, Refused("this model writes text only")] = None
    web_search_options: Annotated[Any, Refused("this server reaches no network")] = None
    moderation: Annotated[Any, Refused("answers are not moderated")] = None
    prompt_cache_options: Annotated[Any, Refused("the prefix cache keeps what was used last")] = None
    chat_template: Annotated[Any, Refused("a template is a program; this server runs only its model's")] = None
    mm_processor_kwargs: Annotated[Any, Refused("this model reads text only")] = None
    media_io_kwargs: Annotated[Any, Refused("this model reads text only")] = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = Field(description="What the token adds to the text, which may be part of a character.")


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = Field(None, description='Stop string or id; "aborted" where it was aborted.')
    token_ids: list[int] | None = None


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="Unix seconds.")
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: Literal["default"] | None = None
    timings: Timings | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatChunk(BaseModel):
    """One `data:` line of the stream; the last one is `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    service_tier: Literal["default"] | None = None
    timings: Timings | None = None
    prompt_token_ids: list[int] | None = None
