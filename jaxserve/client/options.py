"""The keyword arguments of a client's calls, with their types."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

Messages = Sequence[Mapping[str, Any]]  # [{"role": "user", "content": "Hello"}]; a name is the third field there is
Prompt = str | Sequence[int] | Messages


class Terms(TypedDict, total=False):
    """Of any call.

    model       asked for in place of the client's
    timeout     seconds for the whole call, its stream included, in place of the client's; None = no limit
    request_id  letters, digits and ._:- for the server's log; the server makes one up where none is given
    """

    model: str
    timeout: float | None
    request_id: str


class SamplingOptions(TypedDict, total=False):
    """As in `SamplingParams`. What is not given takes the model's default; max_tokens goes up to its context."""

    n: int
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    detokenize: bool
    skip_special_tokens: bool
    spaces_between_special_tokens: bool


class Options(Terms, SamplingOptions, total=False):
    """Of a call that generates.

    priority                 lower runs first, where the server schedules by priority
    cache_salt               cached prefixes are shared between equal salts only
    add_special_tokens       put around the prompt what the model expects there; True for prompts, False for messages
    truncate_prompt_tokens   keep so many tokens of the prompt, -1 = what the context holds; not given = refuse
    truncation_side          which end is cut off, "left" by default
    return_prompt_token_ids  send the prompt's token ids back
    """

    priority: int
    cache_salt: str
    add_special_tokens: bool
    truncate_prompt_tokens: int
    truncation_side: Literal["left", "right"]
    return_prompt_token_ids: bool


class ChatOptions(Options, total=False):
    """Of a call that goes on with a conversation.

    add_generation_prompt   open the assistant's next message; True unless the final one is continued
    continue_final_message  go on with the last message instead
    chat_template_kwargs    further variables for the model's chat template
    """

    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any]


class TokenizeOptions(Terms, total=False):
    """Of `tokenize`.

    add_special_tokens     True for text, False for messages, if not given
    add_generation_prompt  of messages; True if not given
    return_texts           also the text of each token
    """

    add_special_tokens: bool
    add_generation_prompt: bool
    return_texts: bool
