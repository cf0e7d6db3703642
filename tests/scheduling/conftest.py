"""A fake model on a fake paged device, to hold the scheduler against: what a row reads must be its own prefix.

The fake model's keys and values of a position are the hash of every token up to it, and its next token is a function of
that hash and of the sample's index. So one wrong page anywhere changes what is read, and is seen.
"""

from collections import deque
from dataclasses import dataclass, field

import pytest

from jaxserve.request import Request, SamplingParams, TokenLogprobs, TokenOutput
from jaxserve.scheduling.plan import StepPlan, StepResult
from jaxserve.scheduling.scheduler import Scheduler

VOCAB = 40
EOS = 7


def history_after(history: int, token: int) -> int:
    return hash((history, token))


def next_token(history: int, index: int) -> int:
    return hash((history, index, "sample")) % VOCAB


def logprobs_of(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -1.0, 1, [token], [-1.0])


@dataclass
class Alone:
    """One sample of one request on the fake model without batching, pages or cache."""

    request: Request
    index: int
    max_model_len: int
    tokens: list[int] = field(init=False)  # to the longest it may get, past any stop
    histories: list[int] = field(init=False)  # after each of `tokens`
    generated: list[int] = field(init=False)  # up to where it stops
    finish_reason: str = field(init=False)
    stop_reason: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        request, params = self.request, self.request.params
        self.tokens, self.histories = list(request.prompt_token_ids), []
        history = int.from_bytes(request.adapter.encode())  # an adapter changes every key and value
        limit = self.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, len(self.tokens) + params.max_tokens)
        for position in range(limit):
            if position == len(self.tokens):
                self.tokens.append(next_token(history, self.index))
            history = history_after(history, self.tokens[position])
            self.histories.append(history)
        generated = self.tokens[len(request.prompt_token_ids) :]
        self.generated, self.finish_reason = generated, "length"
        for i, token in enumerate(generated):
            if i < params.min_tokens:
                continue
            if token in request.eos_token_ids and not params.ignore_eos:
                self.generated, self.finish_reason = generated[: i + 1], "stop"
                return
            if token in params.stop_token_ids:
                self.generated, self.finish_reason, self.stop_reason = generated[: i + 1], "stop", token
                return


class FakeDevice:
    """Pages, page tables and last tokens by slot; runs packed steps in the order they are launched."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pool: dict[tuple[int, int], int] = {}  # (page, offset) -> history written there
        self.tables: dict[int, list[int]] = {}
        self.last_token: dict[int, int] = {}

    def at(self, slot: int, position: int) -> tuple[int, int]:
        return self.tables[slot][position // self.page_size], position % self.page_size

    def run(self, plan: StepPlan, alone: dict[tuple[str, int], Alone]) -> StepResult:
        """Called when the plan is launched, so everything the host knows is read now, as packing would."""
        truths = [alone[row.sequence.request.id, row.sequence.index] for row in plan.rows]
        written: dict[tuple[int, int], int] = {}
        for row, truth in zip(plan.rows, truths, strict=True):
            table = self.tables.setdefault(row.slot, [])
            assert row.new_pages_from <= len(table)
            table[row.new_pages_from :] = row.sequence.pages[row.new_pages_from :]
            end = row.start + row.count
            if row.feedback:
                assert row.count == 1
                inputs = [self.last_token[row.slot]]
            else:
                inputs = row.sequence.tokens[row.start : end]
            assert inputs == truth.tokens[row.start : end], "a row computes tokens that are not its sequence's"
            for position in range(row.start, end):
                place = self.at(row.slot, position)
                assert place[0] != 0 and place not in written, "two rows write one place"
                written[place] = truth.histories[position]
        self.pool.update(written)  # every write of the step comes before any read
        tokens, logprobs, prompt_logprobs = [], [], []
        for row, truth in zip(plan.rows, truths, strict=True):
            end = row.start + row.count
            read = [self.pool.get(self.at(row.slot, position)) for position in range(end)]
            assert read == truth.histories[:end], "a row reads keys and values that are not its own prefix"
            token = 0
            if row.samples:
                token = self.last_token[row.slot] = next_token(read[-1], row.sequence.index)
            tokens.append(token)
            logprobs.append(logprobs_of(token) if row.sequence.request.params.logprobs is not None else None)
            prompt = row.sequence.request.prompt_token_ids
            wanted = [logprobs_of(t) for t in prompt[row.start + 1 : end + 1]] if row.wants_prompt_logprobs else None
            prompt_logprobs.append(wanted)
        return StepResult(tokens, logprobs, prompt_logprobs)


class Simulation:
    """A scheduler, a fake device and everything that was said, `depth` steps launched ahead of the last collected."""

    def __init__(self, depth: int = 0, **sizes: object) -> None:
        settings: dict = dict(
            num_pages=33, page_size=4, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=96, policy="fcfs"
        )
        settings.update(sizes)
        self.depth = depth
        self.scheduler = Scheduler(**settings)
        self.max_model_len = settings["max_model_len"]
        self.device = FakeDevice(settings["page_size"])
        self.alone: dict[tuple[str, int], Alone] = {}
        self.launched: deque[tuple[StepPlan, StepResult]] = deque()
        self.said: dict[tuple[str, int], list[TokenOutput]] = {}
        self.plans: list[StepPlan] = []
        self.now = 0.0

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        for index in range(request.params.n):
            key = (request.id, index)
            self.alone[key] = Alone(request, index, self.max_model_len)
            self.said[key] = []
        self.scheduler.check()

    def hear(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            said = self.said[output.request_id, output.index]
            assert not said or said[-1].finish_reason is None, "said something after the end"
            said.append(output)
        self.scheduler.check()

    def launch(self) -> StepPlan | None:
        self.now += 1.0
        plan = self.scheduler.plan(self.now)
        self.scheduler.check()
        if plan is not None:
            self.check_plan(plan)
            self.plans.append(plan)
            self.launched.append((plan, self.device.run(plan, self.alone)))
        return plan

    def collect(self) -> None:
        self.hear(self.scheduler.update(*self.launched.popleft()))

    def step(self) -> StepPlan | None:
        """Launches a step, then collects what is more than `depth` steps behind (all, with none to launch)."""
        plan = self.launch()
        while len(self.launched) > (self.depth if plan is not None else 0):
            self.collect()
        self.hear(self.scheduler.take_finished())
        return plan

    def fail(self) -> None:
        """The device loses everything it holds and was told."""
        self.launched.clear()
        self.device = FakeDevice(self.device.page_size)
        self.scheduler.recover()
        self.scheduler.check()

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        while self.launched:
            self.collect()
        assert not self.scheduler.has_work, f"still at work after {max_steps} steps"
        stats = self.scheduler.stats()
        assert (stats.num_waiting, stats.num_running, stats.pages_used) == (0, 0, 0)

    def check_plan(self, plan: StepPlan) -> None:
        rows = plan.rows
        assert rows and plan.num_tokens == sum(row.count for row in rows)
        assert plan.num_tokens <= self.scheduler.limits.max_num_batched_tokens
        assert len({row.slot for row in rows}) == len({id(row.sequence) for row in rows}) == len(rows)
        assert [row.count == 1 for row in rows] == [i < plan.num_single for i in range(len(rows))]
        for row in rows:
            assert row.count > 0 and row.num_generated >= 0
            if row.samples:
                assert row.num_generated == row.sample_position - row.sequence.num_prompt
            assert not (row.feedback and row.sequence.needs_sync)

    def generated(self, request_id: str, index: int = 0) -> list[int]:
        return [token for output in self.said[request_id, index] for token in output.token_ids]

    def end(self, request_id: str, index: int = 0) -> tuple[str | None, object]:
        last = self.said[request_id, index][-1]
        return last.finish_reason, last.stop_reason

    def assert_as_alone(self) -> None:
        """Every sample got the tokens, logprobs and end it gets alone; aborted ones a prefix of them."""
        for (request_id, index), truth in self.alone.items():
            generated, said = self.generated(request_id, index), self.said[request_id, index]
            if truth.request.params.logprobs is not None:
                assert [lp for o in said for lp in o.logprobs or []] == [logprobs_of(token) for token in generated]
            prompt = [lp.token_id for o in said for lp in o.prompt_logprobs or []]
            expected = truth.request.prompt_token_ids[1:]
            if index or truth.request.params.prompt_logprobs is None:
                expected = []
            if said[-1].finish_reason == "abort":
                assert generated == truth.generated[: len(generated)]
                assert prompt == expected[: len(prompt)]
            else:
                assert generated == truth.generated
                assert (said[-1].finish_reason, said[-1].stop_reason) == (truth.finish_reason, truth.stop_reason)
                assert prompt == expected


@pytest.fixture
def simulation():
    """The class; make one with `simulation(depth=..., num_pages=..., ...)`."""
    return Simulation


@pytest.fixture
def make_request():
    """make_request(id, prompt, *, eos, bad_words, salt, adapter, priority, deadline, **sampling) -> Request"""

    def make(
        id: str,
        prompt: list[int],
        *,
        eos: tuple[int, ...] = (EOS,),
        bad_words: tuple[tuple[int, ...], ...] = (),
        salt: str = "",
        adapter: str = "",
        priority: int = 0,
        deadline: float | None = None,
        **sampling: object,
    ) -> Request:
        return Request(
            id=id,
            prompt_token_ids=prompt,
            params=SamplingParams(**sampling),
            eos_token_ids=eos,
            bad_word_token_ids=bad_words,
            cache_salt=salt,
            adapter=adapter,
            priority=priority,
            deadline=deadline,
        )

    return make
