"""Tokens from logits, for rows that all want the same: the likeliest, one of the top k, one of the nucleus."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu.case import Case, Problem, chain_length, ids, noise
from gpu.roofline import Work
from pallas_kernels.backend import REFERENCE, Backend
from pallas_kernels.sampling import api, triton

KINDS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
}
DIFFERING = 0.05  # share of rows that may draw another token: sums of another order put a limit elsewhere


def sampling_case(rows: int, vocab: int, kind: str, backends: tuple[str, ...]) -> Case:
    """kind: of KINDS."""
    return Case(
        op="sampling",
        name=f"{kind}, {rows} rows of {vocab}",
        sizes={"rows": rows, "vocab": vocab},
        dtype="float32",
        tolerance=DIFFERING,
        backends=backends,
        build=lambda: _problem(rows, vocab, KINDS[kind]),
        unsupported=api.unsupported,
        candidates=lambda backend: list(triton.candidates(vocab)),
        tune=kind == "top-p 0.9",
    )


def _problem(rows: int, vocab: int, kind: dict[str, float]) -> Problem:
    words = -(-vocab // 32)
    work = Work(4 * rows * (vocab + words) + 4 * rows, rows * vocab)
    calls = chain_length(work.bytes)
    logits = [3 * noise(i, (rows, vocab), jnp.float32) for i in range(calls)]
    same = lambda value, dtype: jnp.full((rows,), value, dtype)  # noqa: E731
    arguments = {
        "temperature": same(kind["temperature"], jnp.float32),
        "top_k": same(kind.get("top_k", 0), jnp.int32),
        "top_p": same(kind.get("top_p", 1.0), jnp.float32),
        "min_p": same(0.0, jnp.float32),
        "seeds": jnp.arange(rows, dtype=jnp.uint32),
        "bitmask": jnp.full((rows, words), 0xFFFFFFFF, jnp.uint32),
        "adjusts": same(0, jnp.int32),
        "slots": ids(np.arange(rows)),
        "token_counts": jnp.zeros((rows, vocab), jnp.int32),
        "logit_bias": jnp.zeros((rows, vocab), jnp.float32),
        "repetition_penalty": same(1.0, jnp.float32),
        "presence_penalty": same(0.0, jnp.float32),
        "frequency_penalty": same(0.0, jnp.float32),
    }

    def chain(backend: Backend, positions: Any, data: Any) -> Any:
        logits, arguments = data
        sample = jax.jit(
            lambda logits, positions: api.sample(logits, positions=positions, backend=backend, **arguments)
        )
        for i in range(calls):  # the next call's noise depends on this one's tokens
            positions = (positions + sample(logits[i], positions)) & 0xFFF
        return positions

    def result(backend: Backend, data: Any) -> Any:
        logits, arguments = data
        return api.sample(logits[0], positions=ids(np.arange(rows)), backend=backend, **arguments)

    return Problem(
        calls,
        work,
        (logits, arguments),
        lambda: ids(np.arange(rows)),
        chain,
        result,
        lambda data: result(REFERENCE, data),
    )
