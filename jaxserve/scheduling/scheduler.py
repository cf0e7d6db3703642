"""Step-level continuous batching: before every step, decide which tokens of which sequences it computes.

In: requests, aborts, the clock, results of steps. Out: `StepPlan`s and `TokenOutput`s. The contract with the caller:
every plan is packed before the next call, launched in order of `step_id`, and collected by `update` in that order; any
number of plans may be launched before the first is collected. A step that fails is answered by `recover`.

The device runs steps one after another, and a step writes all keys and values of a layer before it reads any. So what a
plan is *going to* write may be treated as written: its full pages are registered at once, even for later rows of the
same step, and pages freed while launched steps still use them are handed out at once: their next owner writes later.

A call costs O(rows + pages that change hands), whatever the contexts and however many wait (but for a heap's log).
"""

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from jaxserve.request import Request, TokenOutput
from jaxserve.scheduling.limits import Limits
from jaxserve.scheduling.plan import Draft, StepPlan, StepResult
from jaxserve.scheduling.roster import Roster
from jaxserve.scheduling.sequence import Sequence, Status
from jaxserve.scheduling.tables import PageTables


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts at one moment; the last three only grow."""

    num_waiting: int
    num_running: int
    pages_used: int  # held by sequences
    pages_free: int
    pages_evictable: int  # held by the prefix cache alone
    num_preemptions: int
    prefix_query_tokens: int  # of admitted sequences, looked up in the prefix cache
    prefix_hit_tokens: int  # and found


class Scheduler:
    """Plans steps over the sequences of a `Roster`. Sizes as in `Limits`, which raises ConfigError if they cannot work.

    policy                  "fcfs", or "priority": lower `Request.priority` first, then arrival
    enable_prefix_caching   False: requests share no pages (the n samples of one request still do)
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        policy: str = "fcfs",
        enable_prefix_caching: bool = True,
    ) -> None:
        self.limits = Limits(
            num_pages=num_pages,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
        )
        self.enable_prefix_caching = enable_prefix_caching
        self.num_preemptions = 0
        self.step_seconds = 0.0  # how long a step takes at least, as the engine measured lately; 0 = not known
        self._tables = PageTables(num_pages, page_size)
        self._roster = Roster(self._tables, max_num_seqs, policy)
        self._deadlines: list[tuple[float, str]] = []  # heap; entries outlive their requests, hence only ids
        self._expired: list[TokenOutput] = []
        self._blocked: tuple[Sequence, int] | None = None  # the head that was not admitted, and the pages it needed
        self._next_step = 0
        self._next_collected = 0
        self._recovered_at = 0  # steps before this one were given up

    @property
    def num_waiting(self) -> int:
        return len(self._roster.waiting)

    @property
    def num_running(self) -> int:
        return len(self._roster.running)

    @property
    def pages_used(self) -> int:
        """Pages held by sequences."""
        return self._tables.allocator.num_used

    @property
    def has_work(self) -> bool:
        """Whether some sequence is unfinished, or its end not yet told."""
        return bool(len(self._roster) or self._expired)

    def stats(self) -> SchedulerStats:
        allocator, prefix = self._tables.allocator, self._tables.allocator.prefix
        return SchedulerStats(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            pages_used=self.pages_used,
            pages_free=allocator.num_free,
            pages_evictable=prefix.num_evictable,
            num_preemptions=self.num_preemptions,
            prefix_query_tokens=prefix.query_tokens,
            prefix_hit_tokens=prefix.hit_tokens,
        )

    def add(self, request: Request) -> None:
        """Queues the request's n samples, or raises an InvalidRequestError that says why it could never run."""
        final_length = self.limits.final_length(request)
        self._roster.enlist(request, final_length, share_prefix=self.enable_prefix_caching)
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, request.id))

    def plan(self, now: float) -> StepPlan | None:
        """The next step, or None if there is nothing to compute. `now` is time.monotonic() in seconds."""
        self._expire(now)
        draft = Draft(self.limits.max_num_batched_tokens)
        self._plan_running(draft)
        self._plan_admissions(draft, now)
        plan = draft.finish(self._next_step)
        self._next_step += plan is not None
        return plan

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Takes in what a launched step sampled; returns what is new, expired deadlines included."""
        outputs = self.take_finished()
        if plan.step_id < self._recovered_at:
            return outputs
        assert plan.step_id == self._next_collected, f"step {plan.step_id} collected, not {self._next_collected}"
        self._next_collected += 1
        tokens = np.asarray(result.tokens).tolist()
        assert len(tokens) == len(plan.rows), f"{len(tokens)} results for {len(plan.rows)} rows"
        for r, row in enumerate(plan.rows):
            sequence = row.sequence
            if sequence.status is Status.FINISHED:  # since the plan was made
                continue
            prompt_logprobs = None
            if result.prompt_logprobs is not None:
                prompt_logprobs = sequence.take_unsent(row.start, result.prompt_logprobs[r])
            if row.samples:
                new_ids = self._append(sequence, tokens[r])
                logprobs = result.logprobs[r] if result.logprobs is not None and new_ids else None
                outputs.append(sequence.output(new_ids, [logprobs] if logprobs is not None else None, prompt_logprobs))
            elif prompt_logprobs:
                outputs.append(sequence.output([], None, prompt_logprobs))
        return outputs

    def take_finished(self) -> list[TokenOutput]:
        """The ends of sequences whose deadline passed, each told once: here or by `update`."""
        expired, self._expired = self._expired, []
        return expired

    def abort(self, request_id: str, index: int | None = None, reason: str = "aborted") -> list[TokenOutput]:
        """Ends one sample or all of a request, wherever it is; [] if there is no such sample (any more)."""
        ended = [s for i, s in self._roster.samples(request_id).items() if index is None or i == index]
        for sequence in ended:
            self._roster.finish(sequence, "abort", reason)
        return [sequence.output([]) for sequence in ended]

    def recover(self) -> None:
        """After a failed step: gives up what launched steps did, keeps the tokens the host knows, and starts over."""
        for sequence in [*self._roster.running]:
            self._roster.requeue(sequence)
        for sequence in self._roster.unfinished():
            sequence.pending = 0
        self._tables.allocator.reset_prefix()
        self._recovered_at = self._next_collected = self._next_step

    def reset_prefix_cache(self) -> None:
        """Nothing computed so far is found by later admissions; running sequences keep their pages."""
        self._tables.allocator.reset_prefix()

    def check(self) -> None:
        """Asserts every invariant. O(everything): for tests and idle checks."""
        self._roster.check()

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heappop(self._deadlines)
            for sequence in self._roster.samples(request_id).values():
                deadline = sequence.request.deadline
                if deadline is not None and deadline <= now:  # not a later request that took over the id
                    self._roster.finish(sequence, "abort", "deadline_exceeded")
                    self._expired.append(sequence.output([]))

    def _plan_running(self, draft: Draft) -> None:
        """One pass, first in order first. A token is set aside for each decoding sequence; prefills share the rest.

        So a prefill with chunks to come leaves no budget to admit others with, who would take the pages it still needs.
        """
        ready = [(sequence, sequence.work) for sequence in self._roster.running if sequence.ready]
        set_aside = sum(1 for _, work in ready if work == 1)
        for sequence, work in ready:
            if sequence.status is not Status.RUNNING:
                break  # preempted in this pass, as all behind it are
            set_aside -= work == 1
            count = min(work, draft.budget - set_aside)
            known_pages = len(sequence.pages)
            if count and (self._tables.grow(sequence, count) or self._preempt_for(sequence, count)):
                draft.add_row(sequence, count, new_pages_from=known_pages)
                self._tables.register(sequence)

    def _preempt_for(self, sequence: Sequence, count: int) -> bool:
        """Takes pages for `count` more tokens from the last in order; False if that comes to be `sequence` itself.

        Sequences before this one are never touched, so the first in order always advances, and so in turn do all.
        """
        while not self._tables.grow(sequence, count):
            victim = self._roster.running[-1]
            self._roster.requeue(victim)
            victim.preemptions += 1
            self.num_preemptions += 1
            if victim is sequence:
                return False
        return True

    def _plan_admissions(self, draft: Draft, now: float) -> None:
        """In strict order: while the head of the queue must wait, so must all behind it."""
        while self._roster.free_slots and draft.budget:
            head = self._roster.waiting.peek()
            if head is None or head.pending:  # preempted in flight: its last token is still to be collected
                return
            cached = self._admissible(head)
            if cached is None:
                return
            if self._hopeless(head, len(cached), now):
                self._roster.finish(head, "abort", "deadline_exceeded")
                self._expired.append(head.output([]))
                continue
            self._roster.admit(head, cached, now)
            draft.admitted.append(head)
            count = min(head.work, draft.budget)
            found = self._tables.grow(head, count)
            assert found, "admitted without the pages for it"
            draft.add_row(head, count, new_pages_from=0)
            self._tables.register(head)

    def _hopeless(self, head: Sequence, num_cached: int, now: float) -> bool:
        """Whether its next token cannot be there before its deadline, were every step as fast as the fastest lately."""
        if head.request.deadline is None:
            return False
        uncached = head.work - num_cached * self.limits.page_size
        steps = -(-uncached // self.limits.max_num_batched_tokens)
        return now + steps * self.step_seconds > head.request.deadline

    def _admissible(self, head: Sequence) -> list[int] | None:
        """The cached pages to start with; None while the pages for all known tokens and one more are not available.

        With nothing running every page is available, and `add` saw to it that they suffice.
        """
        allocator, occupied = self._tables.allocator, self.num_running > 0
        if occupied and self._blocked is not None:
            blocked, needed = self._blocked
            if blocked is head and allocator.num_available < needed:  # nothing to gain from looking it up again
                return None
        cached = self._tables.cached_prefix(head)
        # cached pages that nobody holds count as available, so taking them up costs as much as allocating
        needed = self._tables.pages_for(len(head.tokens)) + 1 - sum(map(allocator.in_use, cached))
        if occupied and allocator.num_available < needed:
            self._blocked = head, needed
            return None
        self._blocked = None
        return cached

    def _append(self, sequence: Sequence, token: int) -> list[int]:
        """One sampled token becomes known, rightly so even if the sequence was preempted since. Returns what is new."""
        sequence.pending -= 1
        if token < 0:
            self._tables.allocator.forget(sequence.page_hashes)  # NaN keys and values must not reach other requests
            self._roster.finish(sequence, "error", "numerical_error")
            return []
        end = sequence.end_at(token)
        sequence.tokens.append(token)
        self._tables.register(sequence)
        if end is not None:
            self._roster.finish(sequence, *end)
        return [token]
