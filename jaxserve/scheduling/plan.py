"""What one step shall do (scheduler -> runner), and what came of it (runner -> scheduler)."""

from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.request import TokenLogprobs
from jaxserve.scheduling.sequence import Sequence


@dataclass(slots=True)  # not frozen: that would triple the cost of making the rows of a step
class PlannedRow:
    """Compute tokens [start, start + count) of one sequence. Never written again, whatever becomes of the sequence."""

    sequence: Sequence
    slot: int
    start: int  # position of the first token to compute
    count: int
    samples: bool  # the row reaches the sequence's last token, so it samples the next one
    feedback: bool  # its one input token is not known to the host: read it from the slot's state
    new_pages_from: int  # index of the first entry of sequence.pages that the slot's page table lacks
    num_generated: int  # tokens sampled before this one (min_tokens needs it)

    @property
    def sample_position(self) -> int:
        """Position of the token this row samples, if it samples."""
        return self.start + self.count

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the result shall hold the logprobs of prompt tokens start + 1 .. start + count."""
        sequence = self.sequence
        return (
            sequence.index == 0
            and sequence.request.params.prompt_logprobs is not None
            and self.start < sequence.num_prompt - 1
        )


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Pack it before the scheduler is called again, and launch plans in the order of `step_id`."""

    step_id: int
    rows: list[PlannedRow]  # rows of one token first
    num_single: int  # how many rows that is
    num_tokens: int
    admitted: list[Sequence]  # those that just got their slot: its old state is void


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the device returned for the R rows of a plan, in order. Entries of rows that do not sample are unread."""

    tokens: np.ndarray | AnySequence[int]  # int[R] sampled ids; negative = the logits were NaN
    logprobs: AnySequence[TokenLogprobs | None] | None = None  # one per row
    # one list per row: entry j is prompt token start + 1 + j, for all of the row's tokens that have one
    prompt_logprobs: AnySequence[list[TokenLogprobs] | None] | None = None


@dataclass(slots=True)
class Draft:
    """A plan while it is made."""

    budget: int  # tokens that still fit
    singles: list[PlannedRow] = field(default_factory=list)
    chunks: list[PlannedRow] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0

    def add_row(self, sequence: Sequence, count: int, new_pages_from: int) -> None:
        """Plans the sequence's next `count` tokens, for which it has pages, and counts them as computed."""
        assert sequence.slot is not None
        start, known, length = sequence.computed, len(sequence.tokens), len(sequence.tokens) + sequence.pending
        samples = start + count == length
        feedback = start >= known
        num_generated = length - sequence.num_prompt
        row = PlannedRow(sequence, sequence.slot, start, count, samples, feedback, new_pages_from, num_generated)
        (self.singles if count == 1 else self.chunks).append(row)
        self.budget -= count
        self.num_tokens += count
        sequence.computed += count
        sequence.pending += samples

    def finish(self, step_id: int) -> StepPlan | None:
        """The plan; None without rows."""
        if not self.num_tokens:
            return None
        return StepPlan(step_id, self.singles + self.chunks, len(self.singles), self.num_tokens, self.admitted)
