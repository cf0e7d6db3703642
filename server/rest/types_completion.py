"""The body of POST /v1/completions and what it answers with."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from server.rest.types_common import GenerationRequest, Int32, PromptLogprob, Refused, Timings, Usage


class CompletionRequest(GenerationRequest):
    prompt: str | list[str] | list[Int32] | list[list[Int32]] = Field(
        description="Text, token ids, or a list of either: up to 1024 prompts, and 1024 choices in all."
    )
    max_tokens: Int32 | None = Field(
        None, description="Tokens to generate at most [16]; the model's context bounds it too."
    )
    logprobs: Int32 | None = Field(None, description="Log probabilities of each token, and of the k likeliest there.")
    best_of: Int32 | None = Field(None, description="Accepted where it equals n: choices are not ranked.")
    suffix: Annotated[Any, Refused("this model was not trained to fill in the middle")] = None
    prompt_embeds: Annotated[Any, Refused("prompts are text or token ids")] = None


class CompletionLogprobs(BaseModel):
    """Lists of one entry per token. Of an echoed prompt's first token, the log probabilities are null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] = Field(description="The chosen token and the likeliest ones.")
    text_offset: list[int] = Field(description="Characters of the choice's text before the token.")


class CompletionChoice(BaseModel):
    index: int = Field(description="Prompt number times n, plus the number of the sample.")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None = Field(description="null in chunks before the choice's last.")
    stop_reason: int | str | None = Field(None, description='Stop string or id; "aborted" where it was aborted.')
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionResponse(BaseModel):
    """Also the shape of a chunk of the stream, where texts and logprobs are what is new."""

    id: str
    object: Literal["text_completion"]
    created: int = Field(description="Unix seconds.")
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timings: Timings | None = None
