"""Tokens from logits f32[R, V], one for each row: what every backend takes and gives.

A row's token is a function of that row's logits, parameters, seed and position only; backends agree on it up to the
rounding of float32. The order is: bitmask, logit bias, penalties, temperature, top-k, top-p, min-p, draw.
"""

from jax import Array

from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.sampling import reference, triton


def unsupported(backend: Backend) -> str:
    """Why `backend` cannot sample; "" if it can."""
    return "" if backend.name in ("reference", "triton") else f"there is no backend named {backend.name}"


def sample(
    logits: Array,
    *,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seeds: Array,
    positions: Array,
    bitmask: Array,
    adjusts: Array,
    slots: Array,
    token_counts: Array,
    logit_bias: Array,
    repetition_penalty: Array,
    presence_penalty: Array,
    frequency_penalty: Array,
    backend: Backend = REFERENCE,
) -> Array:
    """i32[R] a token for each row of f32[R, V]; -1 where the row holds a NaN or everything in it is forbidden.

    temperature: f32[R] 0 = the likeliest token, the first one on ties; else logits are divided by it and drawn from.
    top_k: i32[R] keeps the k largest, 0 or less = all. top_p: f32[R] keeps the smallest set that holds p of the
        probability left by top-k, 1 = all (Holtzman et al. 2019). min_p: f32[R] keeps what is at least p times as
        likely as the likeliest, 0 = all (Nguyen et al. 2024). What ties with the least likely token kept stays too.
    seeds, positions: u32[R], i32[R] determine the noise of the draw, a Gumbel-max (Maddison et al. 2014).
    bitmask: u32[R, ceil(V/32)] bit v%32 of word v//32 allows token v.
    adjusts: i32[R] 1: logit_bias and penalties apply, read from the row's slot. slots: i32[R]; S = padding, no slot.
    token_counts: i32[S, V] times generated, plus PROMPT_FLAG if in the prompt. logit_bias: f32[S, V] added.
    repetition_penalty, presence_penalty, frequency_penalty: f32[R], see `adjust.py`.
    """
    arguments = dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        positions=positions,
        bitmask=bitmask,
        adjusts=adjusts,
        slots=slots,
        token_counts=token_counts,
        logit_bias=logit_bias,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    if backend.name == "triton":
        rows, vocab = logits.shape
        config = triton.choose(rows, vocab, backend)
        return triton.sample(logits, **arguments, config=config, interpret=backend.interpret)
    return reference.sample(logits, **arguments)
