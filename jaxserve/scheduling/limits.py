"""The sizes a scheduler works within: which settings make sense, and which requests could ever run."""

from dataclasses import dataclass

from jaxserve.errors import ConfigError, EmptyPromptError, PromptTooLongError, RequestTooLargeError
from jaxserve.request import Request


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Raises ConfigError, naming setting and value, for sizes that cannot work."""

    num_pages: int  # of the KV pool, the waste page included
    page_size: int  # tokens a page
    max_num_seqs: int  # slots: sequences that run at a time
    max_num_batched_tokens: int  # tokens a step computes at most
    max_model_len: int  # prompt and generated tokens of one sequence at most

    def __post_init__(self) -> None:
        for name, low in (("num_pages", 2), ("page_size", 1), ("max_num_seqs", 1), ("max_model_len", 2)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {low}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}: every decoding sequence takes one token a step"
            )

    def check_prompt(self, num_prompt: int) -> None:
        """Raises PromptTooLongError if a prompt of so many tokens leaves no room for a new one."""
        if num_prompt + 1 > self.max_model_len:
            raise PromptTooLongError(  # clients look for the first words, and then shorten the conversation
                f"this model's maximum context length is {self.max_model_len} tokens (max_model_len), and the prompt "
                f"has {num_prompt}: there is no room for a new one",
                "prompt_token_ids",
                num_prompt,
            )

    def final_length(self, request: Request) -> int:
        """Tokens at which a sample of `request` ends at the latest. Raises InvalidRequestError if it can never run."""
        num_prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
        if not num_prompt:
            raise EmptyPromptError("prompt_token_ids is empty", "prompt_token_ids", [])
        self.check_prompt(num_prompt)
        length = self.max_model_len
        if max_tokens is not None:
            length = min(length, num_prompt + max_tokens)
        pages, pool = -(-length // self.page_size), self.num_pages - 1
        if pages > pool:
            raise RequestTooLargeError(
                f"a prompt of {num_prompt} tokens with max_tokens={max_tokens} may grow to {length} tokens, "
                f"{pages} pages of {self.page_size}, but the KV pool has {pool} pages",
                "max_tokens",
                max_tokens,
            )
        for told in request.progress:  # on an engine that allowed for more
            if not told.finished and (known := num_prompt + len(told.token_ids)) >= length:
                raise RequestTooLargeError(
                    f"the request has grown to {known} tokens, and this engine has room for {length}",
                    "prompt_token_ids",
                    known,
                )
        return length
