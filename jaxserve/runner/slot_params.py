"""The host's mirror of what each slot's sequence asks of the sampler, so that a step is packed by array look-ups.

A request's parameters are read once, when its sequence gets a slot; every later step gathers whole columns.
"""

import numpy as np

from jaxserve.request import Request, SamplingParams
from jaxserve.runner.layout import NUMPY_DTYPES, SAMPLING_FIELDS
from jaxserve.scheduling.sequence import Sequence
from pallas_kernels.sampling.adjust import PROMPT_FLAG


class SlotParams:
    """Columns over the slots. S slots, vocabulary V."""

    def __init__(self, num_slots: int, vocab_size: int):
        self.vocab_size = vocab_size
        self.columns = {name: np.zeros(num_slots, NUMPY_DTYPES[dtype]) for name, dtype in SAMPLING_FIELDS}
        self.draws = np.zeros(num_slots, bool)  # needs more than arg-max in every step
        self.varies = np.zeros(num_slots, bool)  # may need a token mask or prompt logprobs in some steps

    def admit(self, sequence: Sequence) -> bool:
        """Reads the parameters of a sequence that just got its slot; True if the slot needs a logit row."""
        slot, request, params = sequence.slot, sequence.request, sequence.request.params
        assert slot is not None
        adjusts = _adjusts(request)
        values = {
            "temperature": 0.0 if params.greedy else params.temperature,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "top_k": min(max(params.top_k, 0), self.vocab_size),
            "seeds": 0 if params.greedy else sample_seed(params.seed, sequence.index),
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "repetition_penalty": params.repetition_penalty,
            "adjusts": adjusts,
            "wants_logprobs": params.logprobs is not None,
        }
        for name, value in values.items():
            self.columns[name][slot] = value
        self.draws[slot] = not params.greedy or adjusts
        self.varies[slot] = sequence.needs_sync or params.min_tokens > 0 or params.prompt_logprobs is not None
        return adjusts

    def logit_row(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """(token counts i32[V], logit bias f32[V]) of a sequence, from the tokens known now."""
        counts = np.bincount(sequence.tokens[sequence.num_prompt :], minlength=self.vocab_size).astype(np.int32)
        counts[np.unique(sequence.tokens[: sequence.num_prompt])] += PROMPT_FLAG
        return counts, logit_bias(sequence.request, self.vocab_size)


def _penalises(params: SamplingParams) -> bool:
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


def _adjusts(request: Request) -> bool:
    """Whether the request needs token counts or a logit bias."""
    params = request.params
    return (
        _penalises(params)
        or bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or any(len(word) == 1 for word in request.bad_word_token_ids)
    )


def logit_bias(request: Request, vocab_size: int) -> np.ndarray:
    """f32[V]: logit_bias, with -inf for one-token bad words and for all that is not allowed."""
    params = request.params
    bias = np.zeros(vocab_size, np.float32)
    for token, added in (params.logit_bias or {}).items():
        bias[token] = added
    if params.allowed_token_ids is not None:
        forbidden = np.ones(vocab_size, bool)
        forbidden[list(params.allowed_token_ids)] = False
        bias[forbidden] = -np.inf
    for word in request.bad_word_token_ids:
        if len(word) == 1:
            bias[word[0]] = -np.inf
    return bias


def banned_now(sequence: Sequence, num_generated: int) -> list[int]:
    """Tokens that may not come next: the end tokens before min_tokens, the last token of a begun bad word."""
    request = sequence.request
    banned: list[int] = []
    if num_generated < request.params.min_tokens:
        if not request.params.ignore_eos:
            banned.extend(request.eos_token_ids)
        banned.extend(request.params.stop_token_ids or ())
    generated = sequence.tokens[sequence.num_prompt :] if sequence.needs_sync else []
    for word in request.bad_word_token_ids:
        length = len(word) - 1
        if length and len(generated) >= length and tuple(generated[-length:]) == word[:-1]:
            banned.append(word[-1])
    return banned


def sample_seed(seed: int | None, index: int) -> int:
    """u32 the device draws sample `index` of a request with; samples of one seed are independent."""
    assert seed is not None, "a sampled request gets its seed before it is submitted"
    return int(np.random.SeedSequence([seed % 2**64, index]).generate_state(1)[0])
