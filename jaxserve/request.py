"""What goes into the engine and what comes out: sampling parameters, requests, outputs. Imports no JAX.

Field names are those users of vLLM and of the OpenAI API know. `SamplingParams` validates itself when it is made,
so an invalid value never travels further than the line that wrote it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jaxserve.errors import InvalidRequestError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_SAMPLES = 128
MAX_STOP_STRINGS = 16
MAX_BAD_WORDS = 256
MAX_STOP_TOKENS = 4096
MAX_ALLOWED_TOKENS = 2**20  # more than any vocabulary has
MAX_BIASED_TOKENS = 2**16
REPETITION_PENALTIES = (1e-3, 1e3)  # beyond them a logit times a penalty leaves float32
GREEDY_TEMPERATURE = 1e-5  # below this a row is decoded greedily


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is decoded. Immutable; raises `InvalidRequestError` naming field and value.

    Processing order on the device is: logit_bias / allowed_token_ids / bad_words / min_tokens, penalties,
    temperature, top_k, top_p, min_p, draw. Logprobs are those of the raw logits, before any of this.

    n                        samples per prompt; they share the prompt's pages
    max_tokens               tokens to generate at most; None = up to the model's context
    min_tokens               end-of-sequence and stop tokens are impossible before this many tokens
    temperature              0 = greedy
    top_p, top_k, min_p      nucleus (Holtzman et al. 2019), top-k (0 or -1 = off), min-p (Nguyen et al. 2024)
    presence/frequency_penalty   OpenAI's definition, on generated tokens, -2..2
    repetition_penalty       Keskar et al. 2019 (CTRL), on prompt and generated tokens, 0.001..1000
    seed                     the sample depends on (seed, position) only; None = drawn by the engine
    stop, stop_token_ids     strings / ids that end the sample
    include_stop_str_in_output  keep the stop string in the text
    ignore_eos               keep generating past the end-of-sequence token
    logprobs                 None = off, k = chosen token and the k most likely ones
    prompt_logprobs          the same for every prompt token but the first
    logit_bias               {token id: added logit}, -100..100
    allowed_token_ids        only these can be generated
    bad_words                strings that are never generated
    detokenize               False = no text, token ids only
    skip_special_tokens, spaces_between_special_tokens   how token ids become text
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | tuple[str, ...] | list[str] | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | list[int] | None = None
    bad_words: tuple[str, ...] | list[str] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_SAMPLES)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1)
        _check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _invalid("min_tokens", self.min_tokens, f"must not exceed max_tokens={_shown(self.max_tokens)}")
        _check_float("temperature", self.temperature, 0.0, 2.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("top_k", self.top_k, -1)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, *REPETITION_PENALTIES)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0)
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ):
            if not isinstance(getattr(self, name), bool):
                raise _invalid(name, getattr(self, name), "must be true or false")
        object.__setattr__(self, "stop", _strings("stop", self.stop, MAX_STOP_STRINGS))
        object.__setattr__(self, "bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKENS)
            if not allowed:
                raise _invalid("allowed_token_ids", allowed, "must name at least one token")
            object.__setattr__(self, "allowed_token_ids", allowed)
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        if self.stop and not self.detokenize:
            raise _invalid("stop", self.stop, "needs detokenize=True")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE


class Logprob(NamedTuple):
    """Log probability (natural log) of one token at one position; rank 1 is the most likely."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class SampleProgress(NamedTuple):
    """What one sample had generated when the engine it ran in died."""

    token_ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Request:
    """One accepted prompt, as the engine core sees it: tokens in, tokens out, no text."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    bad_word_token_ids: tuple[tuple[int, ...], ...] = ()  # params.bad_words, tokenized
    cache_salt: str = ""
    adapter: str = ""
    priority: int = 0  # lower runs first, under the `priority` policy
    arrival_time: float = 0.0  # time.monotonic() seconds
    deadline: float | None = None  # time.monotonic() seconds
    progress: tuple[
        SampleProgress, ...
    ] = ()  # one per sample, of a request that goes on where it stood; () = a new one
    prompt_logprobs_sent: int = 0  # positions told before

    @property
    def open_samples(self) -> list[int]:
        """Indices of the samples that are still to be generated."""
        return [i for i in range(self.params.n) if not (self.progress and self.progress[i].finished)]


class TokenLogprobs(NamedTuple):
    """Raw-logit log probabilities at one position, before token ids are turned into text."""

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(kw_only=True)
class TokenOutput:
    """What one step did for one sample of one request: the message from engine core to front end."""

    request_id: str
    index: int  # which of the n samples
    token_ids: list[int]  # new tokens only
    logprobs: list[TokenLogprobs] | None = None  # one per new token
    prompt_logprobs: list[TokenLogprobs] | None = None  # new prompt positions only, sample 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # stop token id, or the cause of an abort or error
    cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    preemptions: int = 0
    scheduled_time: float | None = None  # time.monotonic() of first admission


@dataclass(kw_only=True)
class RequestMetrics:
    """Timings of one request; instants are time.monotonic() seconds, durations are seconds."""

    arrival_time: float
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    queue_time: float | None = None  # arrival -> first scheduled
    time_to_first_token: float | None = None  # arrival -> first token
    time_per_output_token: float | None = None  # mean gap after the first token
    cached_tokens: int = 0
    preemptions: int = 0


@dataclass(kw_only=True)
class RequestDelta:
    """What is new in one sample of a request that streams."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, "Logprob"]] | None = None  # one per new token
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(kw_only=True)
class CompletionOutput:
    """One sample."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(kw_only=True)
class RequestOutput:
    """Everything generated for one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(arrival_time=0.0))


def _shown(value: Any) -> str:
    """repr, but short, whatever a client sent."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 80 else text[:77] + "..."


def _invalid(name: str, value: Any, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name}={_shown(value)} {why}", name, value)


def _check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _invalid(name, value, "must be an integer")
    if value < low or (high is not None and value > high):
        raise _invalid(name, value, f"must be at least {low}" if high is None else f"must be in {low}..{high}")


def _check_float(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise _invalid(name, value, "must be a finite number")
    if not low <= value <= high or (open_low and value == low):
        raise _invalid(name, value, f"must be in {'(' if open_low else '['}{low}, {high}]")


def _strings(name: str, value: Any, limit: int) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else _items(name, value, "a string or a list of strings")
    if len(strings) > limit:
        raise _invalid(name, f"{len(strings)} strings", f"may hold at most {limit}")
    for text in strings:
        if not isinstance(text, str) or not text:
            raise _invalid(name, text, "must hold non-empty strings")
    return strings


def _token_ids(name: str, value: Any, limit: int) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = _items(name, value, "a list of token ids")
    if len(ids) > limit:
        raise _invalid(name, f"{len(ids)} token ids", f"may hold at most {limit}")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise _invalid(name, token, "must hold token ids (non-negative integers)")
    return ids


def _items(name: str, value: Any, what: str) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        raise _invalid(name, value, f"must be {what}")
    return tuple(value)


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _invalid("logit_bias", value, "must map token ids to numbers")
    if len(value) > MAX_BIASED_TOKENS:
        raise _invalid("logit_bias", f"{len(value)} tokens", f"may hold at most {MAX_BIASED_TOKENS}")
    bias = {}
    for token, added in value.items():
        is_id = isinstance(token, int) and not isinstance(token, bool)
        if isinstance(token, str) and len(token) < 20 and token.isascii() and token.isdigit():
            token, is_id = int(token), True  # JSON objects have string keys
        if not is_id or token < 0:
            raise _invalid("logit_bias", token, "must have token ids as keys")
        _check_float("logit_bias", added, -100.0, 100.0)
        bias[token] = float(added)
    return bias
