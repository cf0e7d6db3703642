"""The bucket ladder: the few step shapes that are compiled before the first request. Imports no JAX.

A step of any content is padded to the smallest shape of the ladder that holds it. There are two kinds:

    decode   tokens == rows: one token a row. Rows grow in powers of two up to `max_num_seqs`.
    mixed    prompt chunks beside decoding rows. Tokens grow in powers of two up to `max_num_batched_tokens`, with a
             quarter as many rows but never more than `max_num_seqs`.

A "full" sampler does everything, and skips at run time what no row asked for. A skip is a branch, which keeps a step
from being one CUDA graph; so on GPU each decode shape also comes "greedy": arg-max and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxserve.errors import ConfigError

Sampler = Literal["greedy", "full"]

SMALLEST_MIXED_TOKENS = 32


@dataclass(frozen=True)
class StepShape:
    """Everything static about one step program: the key it is compiled under."""

    tokens: int  # T
    rows: int  # R
    sampler: Sampler

    @property
    def decode(self) -> bool:
        """Row i holds exactly token i (padding included)."""
        return self.tokens == self.rows

    @property
    def sampling_rows(self) -> int:
        """Rows that bring sampling parameters and token masks: all with the "full" sampler, none with the "greedy"."""
        return self.rows if self.sampler == "full" else 0

    def page_updates(self, page_size: int) -> int:
        """U: page-table entries one step can carry; each row may begin a page, each page of tokens one more."""
        return self.rows if self.decode else self.rows + self.tokens // page_size


def ladder(max_num_seqs: int, max_num_batched_tokens: int, *, greedy_shapes: bool) -> list[StepShape]:
    """All step shapes, smallest first; the last one holds any step.

    greedy_shapes: decode shapes with the "greedy" sampler too.
    """
    samplers: tuple[Sampler, ...] = ("greedy", "full") if greedy_shapes else ("full",)
    shapes = {StepShape(rows, rows, sampler) for rows in _doublings(1, max_num_seqs) for sampler in samplers}
    # Room for a one-token row beside every sequence keeps a mixed shape from ever being mistaken for a decode shape.
    largest = max(max_num_batched_tokens, max_num_seqs + 1, SMALLEST_MIXED_TOKENS)
    for tokens in _doublings(SMALLEST_MIXED_TOKENS, largest):
        shapes.add(StepShape(tokens, min(max_num_seqs, tokens // 4), "full"))
    shapes.add(StepShape(largest, max_num_seqs, "full"))
    return sorted(shapes, key=lambda shape: (shape.tokens, shape.rows, shape.sampler == "full"))


def choose(ladder: Sequence[StepShape], tokens: int, rows: int, *, greedy: bool) -> StepShape:
    """The smallest shape that holds a step of so many tokens and rows; a "greedy" one only if `greedy`.

    ladder: in the order `ladder` returns, where a greedy shape stands before its full twin. tokens == rows asks
    for a decode shape, anything else for a mixed one.
    """
    for shape in ladder:
        if shape.decode != (tokens == rows) or shape.tokens < tokens or shape.rows < rows:
            continue
        if shape.sampler == "full" or greedy:
            return shape
    raise ConfigError(f"no step shape holds {tokens} tokens in {rows} rows; the largest is {ladder[-1]}")


def _doublings(first: int, last: int) -> list[int]:
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= 2
    return [*sizes, last]
