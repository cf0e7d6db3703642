"""What the bodies of /v1/completions and /v1/chat/completions have in common, and the objects both answer with.

JSON types are checked here, ranges by `SamplingParams`, what the model bounds by admission. The description of a field
says what it does, also in /openapi.json. Responses are not built from the models here, only described.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema

from server.rest.types_misc import RequestBody

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Numbers = Annotated[  # of which SamplingParams checks the values, up to the first wrong one
    dict[str, Any], WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}})
]


@dataclass(frozen=True)
class Refused:
    """Marks a field clients know but jaxserve does not do: anything but null, false and empty gets a 400 with `why`."""

    why: str

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, False], "description": f"Refused: {self.why}"}


class StreamOptions(RequestBody):
    include_usage: bool | None = Field(None, description="End with a chunk that has no choices but the usage of all.")
    continuous_usage_stats: bool | None = Field(None, description="Usage so far, of all choices, in every chunk.")
    include_obfuscation: Annotated[bool | None, Refused("chunks are never padded")] = None


class ResponseFormat(RequestBody):
    type: Literal["text", "json_object", "json_schema"] = Field(description="Only text is supported.")
    json_schema: Any = None


class GenerationRequest(RequestBody):
    """Fields of both routes. What is null or left out takes the model's own default, else OpenAI's."""

    model: str | None = Field(None, description="A name of /v1/models; null is the one model this server runs.")
    # OpenAI's
    n: Int32 | None = Field(None, description="Choices for each prompt, 1..128.")
    temperature: float | None = Field(None, description="0 = greedy, at most 2.")
    top_p: float | None = Field(None, description="Nucleus sampling, in (0, 1].")
    presence_penalty: float | None = Field(None, description="-2..2, on generated tokens.")
    frequency_penalty: float | None = Field(None, description="-2..2, on generated tokens.")
    logit_bias: Numbers | None = Field(None, description="Token id -> -100..100, added to its logit.")
    seed: int | None = Field(None, description="64 bits; the sample depends on it and the position only.")
    stop: str | list[str] | None = Field(None, description="Up to 16 strings that end the choice and are cut off.")
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream=true.")
    response_format: ResponseFormat | None = Field(None, description='Only {"type": "text"}.')
    user: str | None = Field(None, description="Accepted, not used and not stored.")
    # As users of vLLM know them
    top_k: Int32 | None = Field(None, description="Sample from the k likeliest tokens; 0 or -1 = off.")
    min_p: float | None = Field(None, description="Drop tokens less likely than min_p times the likeliest, 0..1.")
    repetition_penalty: float | None = Field(None, description="Above 1 discourages tokens of prompt and output.")
    min_tokens: Int32 | None = Field(None, description="No end before this many tokens.")
    stop_token_ids: list[Int32] | None = Field(None, description="Token ids that end the choice.")
    include_stop_str_in_output: bool | None = Field(None, description="Keep the stop string in the text.")
    ignore_eos: bool | None = Field(None, description="Go on past the end-of-sequence token.")
    allowed_token_ids: list[Int32] | None = Field(None, description="Only these tokens can be generated.")
    bad_words: list[str] | None = Field(None, description="Up to 256 strings that are never generated.")
    skip_special_tokens: bool | None = Field(None, description="Leave special tokens out of the text [true].")
    spaces_between_special_tokens: bool | None = Field(None, description="Where the tokenizer puts them [true].")
    prompt_logprobs: Int32 | None = Field(
        None, description="Log probabilities of the prompt's tokens, with the k likeliest at each; not with stream."
    )
    return_tokens_as_token_ids: bool | None = Field(None, description='Logprobs name tokens "token_id:17".')
    return_token_ids: bool | None = Field(None, description="Add token_ids to choices, and prompt_token_ids.")
    echo: bool | None = Field(
        None, description="Begin the text with the prompt (chat: with a final assistant message that is continued)."
    )
    add_special_tokens: bool | None = Field(
        None, description="Put the model's special tokens round the prompt [true, chat: false: templates write them]."
    )
    truncate_prompt_tokens: Int32 | None = Field(
        None, description="Keep so many tokens of the prompt; -1 = as many as the context holds. Never done unasked."
    )
    truncation_side: Literal["left", "right"] | None = Field(None, description="What is cut off [left].")
    priority: Int32 | None = Field(None, description="Lower runs first, where the server schedules by priority [0].")
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="Cached prefixes are shared between equal salts only."
    )
    request_id: str | None = Field(None, description="As the header X-Request-Id: echoed there, and in the logs.")
    # Ours
    return_timings: bool | None = Field(None, description="Add `timings` to the answer (stream: to a last chunk).")
    # Not done
    structured_outputs: Annotated[Any, Refused("output cannot be constrained to a schema or grammar")] = None
    guided_json: Annotated[Any, Refused("output cannot be constrained to a schema or grammar")] = None
    guided_regex: Annotated[Any, Refused("output cannot be constrained to a schema or grammar")] = None
    guided_choice: Annotated[Any, Refused("output cannot be constrained to a schema or grammar")] = None
    guided_grammar: Annotated[Any, Refused("output cannot be constrained to a schema or grammar")] = None
    use_beam_search: Annotated[Any, Refused("jaxserve samples; it has no beam search")] = None
    length_penalty: Annotated[Any, Refused("it is a parameter of beam search, which jaxserve does not have")] = None
    logprob_token_ids: Annotated[Any, Refused("logprobs are those of the likeliest tokens only")] = None
    kv_transfer_params: Annotated[Any, Refused("the cache is not shared between servers")] = None
    vllm_xargs: Annotated[Any, Refused("jaxserve has no extensions that read it")] = None


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens found in the prefix cache.")


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int = Field(description="Of all choices.")
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Timings(BaseModel):
    """Seconds, as the server saw them; of several prompts, the longest."""

    queue_seconds: float | None = Field(description="Arrival to first scheduled.")
    time_to_first_token_seconds: float | None
    time_per_output_token_seconds: float | None = Field(description="Mean gap after the first token.")
    total_seconds: float | None = Field(description="Arrival to last token.")
    preemptions: int


class PromptLogprob(BaseModel):
    logprob: float
    rank: int | None
    decoded_token: str | None
