"""The bucket ladder: the few step shapes that are compiled before the first request. Imports no JAX.

A step of any content is padded to the smallest shape of the ladder that holds it. There are two kinds:

    decode   tokens == rows: one token a row. Rows grow in powers of two up to `max_num_seqs`.
    mixed    prompt chunks beside decoding rows. Tokens grow in powers of two up to `max_num_batched_tokens`, with a
             quarter as many rows but never more than `max_num_seqs`.

What follows the logits comes in three samplers, each doing more than the one before:

    greedy   arg-max and nothing else
    sampled  bans, penalties, filters and the draw
    full     log probabilities too, which are skipped at run time when no row asked for them; such a skip is a branch,
             for which a GPU makes the host wait

A CPU does with "full". A GPU has a second one for the steps in which nobody asked for log probabilities, which is then
one CUDA graph: "sampled" where the sampling kernel runs, for it has no branch; "greedy" beside the reference, which is
made of branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from jaxserve.errors import ConfigError

Sampler = Literal["greedy", "sampled", "full"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

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
        """Rows that bring sampling parameters and token masks: none if "greedy"."""
        return 0 if self.sampler == "greedy" else self.rows

    @property
    def prompt_targets(self) -> int:
        """Tokens whose prompt log probability can be asked for."""
        return self.tokens if self.sampler == "full" and not self.decode else 0

    def page_updates(self, page_size: int) -> int:
        """U: page-table entries one step can carry; each row may begin a page, each page of tokens one more."""
        return self.rows if self.decode else self.rows + self.tokens // page_size


def ladder(
    max_num_seqs: int, max_num_batched_tokens: int, *, samplers: Sequence[Sampler] = ("full",)
) -> list[StepShape]:
    """All step shapes, smallest first; the last one holds any step.

    samplers: what each size comes with; "full" is among them.
    """
    assert "full" in samplers, samplers
    sizes = {(rows, rows) for rows in _doublings(1, max_num_seqs)}
    # Room for a one-token row beside every sequence keeps a mixed shape from ever being mistaken for a decode shape.
    largest = max(max_num_batched_tokens, max_num_seqs + 1, SMALLEST_MIXED_TOKENS)
    for tokens in _doublings(SMALLEST_MIXED_TOKENS, largest):
        sizes.add((tokens, min(max_num_seqs, tokens // 4)))
    sizes.add((largest, max_num_seqs))
    shapes = [StepShape(*size, sampler) for size in sizes for sampler in samplers]
    return sorted(shapes, key=lambda shape: (shape.tokens, shape.rows, SAMPLERS.index(shape.sampler)))


def choose(ladder: Sequence[StepShape], tokens: int, rows: int, *, sampler: Sampler) -> StepShape:
    """The smallest shape that holds a step of so many tokens and rows, with a sampler that does at least `sampler`.

    ladder: in the order `ladder` returns, lesser samplers first. tokens == rows asks for a decode shape, anything else
    for a mixed one.
    """
    for shape in ladder:
        if shape.decode != (tokens == rows) or shape.tokens < tokens or shape.rows < rows:
            continue
        if SAMPLERS.index(shape.sampler) >= SAMPLERS.index(sampler):
            return shape
    raise ConfigError(f"no step shape holds {tokens} tokens in {rows} rows; the largest is {ladder[-1]}")


def _doublings(first: int, last: int) -> list[int]:
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= 2
    return [*sizes, last]
