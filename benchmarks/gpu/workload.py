"""The requests of the comparison: token ids and a length to generate, the same for every engine."""

from dataclasses import dataclass

import numpy as np

PROMPT = (32, 1024)  # tokens, drawn so that their logarithm is uniform: many short, few long
OUTPUT = (32, 512)
SHARED = 2048
TINY = ((4, 24), (3, 8), 32)


@dataclass(frozen=True)
class Job:
    prompt: list[int]
    output_tokens: int


def mixed_jobs(count: int, vocab_size: int, *, tiny: bool) -> list[Job]:
    """Prompts that share nothing."""
    prompt, output, _ = TINY if tiny else (PROMPT, OUTPUT, SHARED)
    random = np.random.default_rng(4)
    lengths = zip(_drawn(random, prompt, count), _drawn(random, output, count), strict=True)
    return [Job(random.integers(0, vocab_size, length).tolist(), tokens) for length, tokens in lengths]


def prefixed(jobs: list[Job], vocab_size: int, *, shared: bool, tiny: bool) -> list[Job]:
    """The same jobs behind a long beginning: one that all share, or one of their own each."""
    length = TINY[2] if tiny else SHARED
    random = np.random.default_rng(5)
    beginnings = [random.integers(0, vocab_size, length).tolist() for _ in range(1 if shared else len(jobs))]
    return [Job(beginnings[i % len(beginnings)] + job.prompt, job.output_tokens) for i, job in enumerate(jobs)]


def _drawn(random: np.random.Generator, bounds: tuple[int, int], count: int) -> list[int]:
    low, high = np.log(bounds)
    return np.exp(random.uniform(low, high, count)).round().astype(int).tolist()
