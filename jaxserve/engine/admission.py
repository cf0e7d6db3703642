"""From what a caller asks to a `Request` the engine accepts: the one validator of every door.

Everything that depends on the model is checked here (token ids against the vocabulary, lengths against the context and
the pool); what does not was checked by `SamplingParams`.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence

import numpy as np

from jaxserve.errors import EmptyPromptError, InvalidRequestError, TokenOutOfRangeError
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduling.limits import Limits
from jaxserve.text.tokenizer import Tokenizer

MAX_SALT_CHARS = 128


class Admission:
    """vocab_size: tokens the model has. seed: of the seeds given to requests without one."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: Limits,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        max_logprobs: int,
        seed: int | tuple[int, ...],
    ):
        self._tokenizer = tokenizer
        self._limits = limits
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._max_logprobs = max_logprobs
        self._seeds = np.random.default_rng(seed)
        self._ids = itertools.count()

    def request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        request_id: str | None = None,
        arrival_time: float | None = None,
    ) -> Request:
        """Raises InvalidRequestError naming field and value.

        timeout       seconds from arrival, None = none
        request_id    unique among all requests of the engine; None = the next of this admission
        arrival_time  time.monotonic() seconds; None = now
        """
        now = time.monotonic() if arrival_time is None else arrival_time
        if timeout is not None and (
            isinstance(timeout, bool)
            or not isinstance(timeout, int | float | np.integer | np.floating)
            or not timeout > 0
        ):
            raise InvalidRequestError(f"timeout={timeout!r} must be a positive number of seconds", "timeout", timeout)
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidRequestError(f"priority={priority!r} must be an integer", "priority", priority)
        if not isinstance(cache_salt, str) or len(cache_salt) > MAX_SALT_CHARS or not _is_text(cache_salt):
            raise InvalidRequestError(
                f"cache_salt must be a string of at most {MAX_SALT_CHARS} characters", "cache_salt", cache_salt
            )
        if isinstance(prompt, str):
            # A tokenizer can hold more tokens than the model was given, so its ids are checked like anyone's.
            token_ids = self._checked_ids(
                "prompt", self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            )
        else:
            self._limits.check_prompt(len(prompt))  # before millions of ids are looked at
            token_ids = self._checked_ids("prompt_token_ids", prompt)
        if not token_ids:
            raise EmptyPromptError("prompt is empty: it must hold at least one token", "prompt", prompt)
        self._check_params(params)
        if params.seed is None and not params.greedy:
            params = dataclasses.replace(params, seed=int(self._seeds.integers(2**63)))
        request = Request(
            id=request_id or f"req-{next(self._ids)}",
            prompt_token_ids=token_ids,
            params=params,
            eos_token_ids=self._eos_token_ids,
            bad_word_token_ids=self._bad_words(params),
            cache_salt=cache_salt,
            priority=priority,
            arrival_time=now,
            deadline=None if timeout is None else now + float(timeout),
        )
        self._limits.final_length(request)
        return request

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(params, name)
            if wanted is not None and wanted > self._max_logprobs:
                raise InvalidRequestError(
                    f"{name}={wanted} exceeds max_logprobs={self._max_logprobs} of this engine", name, wanted
                )
        self._checked_ids("stop_token_ids", params.stop_token_ids or ())
        self._checked_ids("logit_bias", tuple(params.logit_bias or ()))
        self._checked_ids("allowed_token_ids", params.allowed_token_ids or ())
        if params.allowed_token_ids is not None and params.min_tokens:
            ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else self._eos_token_ids)}
            if ends.issuperset(params.allowed_token_ids):
                raise InvalidRequestError(
                    f"allowed_token_ids={list(params.allowed_token_ids)} holds end tokens only, and "
                    f"min_tokens={params.min_tokens} forbids those: nothing could be generated",
                    "allowed_token_ids",
                    params.allowed_token_ids,
                )

    def _checked_ids(self, field: str, ids: Sequence[int]) -> list[int]:
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise InvalidRequestError(f"{field} must hold integers, not {token!r}", field, token)
            if not 0 <= token < self._vocab_size:
                raise TokenOutOfRangeError(
                    f"{field} holds token id {token}, outside [0, {self._vocab_size})", field, int(token)
                )
        return [int(token) for token in ids]

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Token sequences of every bad word, at the start of a text and after a space."""
        assert not isinstance(params.bad_words, str)
        found: dict[tuple[int, ...], None] = {}
        for word in params.bad_words or ():
            for text in (word, " " + word.lstrip()):
                ids = tuple(self._tokenizer.encode(text, add_special_tokens=False, parse_special=False))
                if ids and max(ids) < self._vocab_size:  # the model cannot generate the others anyway
                    found[ids] = None
        return tuple(found)


def _is_text(string: str) -> bool:
    """Whether it holds no lone surrogates, which no encoding of Unicode can carry."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True
