"""Plans of the real scheduler, packed: the arrays say what the plan says, and the device ends up with its page tables.

A simulated device follows the packed arrays alone. What it computes is compared with each sequence's own tokens.
"""

from collections import deque
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.request import Request, SamplingParams
from jaxserve.runner.layout import NUMPY_DTYPES, SAMPLING_FIELDS, fields
from jaxserve.runner.pack import pack
from jaxserve.runner.slot_params import SlotParams, sample_seed
from jaxserve.scheduling.plan import StepResult
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.shapes import SAMPLERS, choose, ladder
from pallas_kernels.sampling.adjust import PROMPT_FLAG

VOCAB, EOS, SLOTS, MAX_LEN = 40, 7, 5, 96


def views_of(step, page_size):
    """{field: array}, cut out of the packed buffer."""
    parts, start = {}, 0
    for field in fields(step.shape, page_size):
        parts[field.name] = step.packed[start : start + field.size].view(NUMPY_DTYPES[field.dtype])
        start += field.size
    assert start == step.packed.size
    return parts


class Simulation:
    """Scheduler, packing, and a device that knows only what was packed."""

    def __init__(self, seed, *, depth=0, page_size=4, num_pages=200, budget=32, samplers=SAMPLERS):
        self.rng, self.depth, self.page_size = Random(seed), depth, page_size
        self.scheduler = Scheduler(
            num_pages=num_pages,
            page_size=page_size,
            max_num_seqs=SLOTS,
            max_num_batched_tokens=budget,
            max_model_len=MAX_LEN,
        )
        self.ladder = ladder(SLOTS, budget, samplers=samplers)
        self.params = SlotParams(SLOTS, VOCAB)
        self.tables = np.full((SLOTS, -(-MAX_LEN // page_size)), -1)
        self.last_token = np.full(SLOTS, -1)
        self.truth: dict = {}  # sequence -> its tokens, those in flight included
        self.launched: deque = deque()
        self.packed: list = []
        self.count = 0

    def add(self, prompt, *, bad_words=(), **sampling):
        params = SamplingParams(**{"seed": self.count, **sampling})
        self.scheduler.add(
            Request(
                id=str(self.count),
                prompt_token_ids=prompt,
                params=params,
                eos_token_ids=(EOS,),
                bad_word_token_ids=bad_words,
            )
        )
        self.count += 1

    def add_random(self):
        rng = self.rng
        prompt = [3] * rng.choice([0, 9, 30]) + [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 7, 20]))]
        penalised = rng.random() < 0.3
        self.add(
            prompt,
            n=rng.choice([1, 1, 3]),
            max_tokens=rng.choice([1, 8, 40]),
            temperature=rng.choice([0.0, 0.0, 0.8]),
            top_p=rng.choice([1.0, 0.7]),
            top_k=rng.choice([-1, 0, 5]),
            min_p=rng.choice([0.0, 0.1]),
            presence_penalty=0.5 if penalised else 0.0,
            repetition_penalty=1.25 if penalised else 1.0,
            min_tokens=rng.choice([0, 0, 1]),
            stop_token_ids=rng.choice([(), (11, 12)]),
            ignore_eos=rng.random() < 0.5,
            logprobs=rng.choice([None, None, 2]),
            prompt_logprobs=rng.choice([None, None, 0]),
            bad_words=rng.choice([(), (), ((5,),), ((1, 2), (3, 3, 4))]),
        )

    def step(self):
        plan = self.scheduler.plan(0.0)
        if plan is not None:
            self.launched.append((plan, self.run(plan)))
        while len(self.launched) > (self.depth if plan is not None else 0):
            plan_, tokens = self.launched.popleft()
            self.scheduler.update(plan_, StepResult(tokens))
        return plan

    def run(self, plan):
        """Packs a plan, runs it on the simulated device and checks everything; returns the sampled tokens."""
        for sequence in plan.admitted:
            tokens = self.truth.setdefault(sequence, list(sequence.tokens))
            adjusts = self.params.admit(sequence)
            counts, _ = self.params.logit_row(sequence)
            assert adjusts or sequence.request.params.presence_penalty == 0
            generated = np.bincount(tokens[sequence.num_prompt :], minlength=VOCAB)
            prompt = np.isin(np.arange(VOCAB), tokens[: sequence.num_prompt])
            np.testing.assert_array_equal(counts, generated + PROMPT_FLAG * prompt)
        step = pack(plan, self.params, self.ladder, num_slots=SLOTS, page_size=self.page_size)
        self.packed.append(step)
        views = views_of(step, self.page_size)
        self.check_rows(plan, step, views)
        self.update_tables(plan, step, views)
        self.check_sampling(plan, step, views)
        return self.sample(plan, views)

    def check_rows(self, plan, step, views):
        rows, shape = plan.rows, step.shape
        num_rows, num_tokens = len(rows), plan.num_tokens
        starts = views["query_start"]
        assert starts[0] == 0 and (np.diff(starts) >= 0).all()
        assert starts[-1] == num_tokens  # from there on the step writes to the waste page
        np.testing.assert_array_equal(np.diff(starts), [r.count for r in rows] + [0] * (shape.rows - num_rows))
        np.testing.assert_array_equal(views["slots"][:num_rows], [row.slot for row in rows])
        assert (views["slots"][num_rows:] == SLOTS).all()
        np.testing.assert_array_equal(views["kv_lens"][:num_rows], [row.start + row.count for row in rows])
        assert not views["kv_lens"][num_rows:].any() and not views["samples"][num_rows:].any()
        np.testing.assert_array_equal(views["samples"][:num_rows], [row.samples for row in rows])
        assert ((views["token_row"] >= 0) & (views["token_row"] < shape.rows)).all()
        if shape.decode:
            np.testing.assert_array_equal(views["token_row"], np.arange(shape.rows))
        assert not views["positions"][num_tokens:].any() and not views["token_ids"][num_tokens:].any()
        for r, row in enumerate(rows):
            mine = slice(starts[r], starts[r + 1])
            truth, known = self.truth[row.sequence], len(row.sequence.tokens)
            np.testing.assert_array_equal(views["token_row"][mine], r)
            np.testing.assert_array_equal(views["positions"][mine], np.arange(row.start, row.start + row.count))
            ids = views["token_ids"][mine]
            assert ((ids == -1) == (views["positions"][mine] >= known)).all(), "-1 stands for what the host cannot know"
            ids = np.where(ids == -1, self.last_token[row.slot], ids)
            np.testing.assert_array_equal(ids, truth[row.start : row.start + row.count])

    def update_tables(self, plan, step, views):
        for slot, pages in step.page_rows:
            self.tables[slot] = 0
            self.tables[slot, : len(pages)] = pages
        slots, indices, pages = views["update_slot"], views["update_index"], views["update_page"]
        real = slots != SLOTS
        assert (slots[real] < SLOTS).all() and (slots >= 0).all()
        assert len(set(zip(slots[real], indices[real], strict=True))) == real.sum(), "an entry is written twice"
        self.tables[slots[real], indices[real]] = pages[real]
        for row in plan.rows:
            mine = row.sequence.pages
            np.testing.assert_array_equal(self.tables[row.slot, : len(mine)], mine)

    def banned(self, row):
        params, truth = row.sequence.request.params, self.truth[row.sequence]
        generated = truth[row.sequence.num_prompt :]
        banned = set()
        if len(generated) < params.min_tokens:
            banned |= set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
        for word in row.sequence.request.bad_word_token_ids:
            if len(word) > 1 and tuple(generated[-len(word) + 1 :]) == word[:-1]:
                banned.add(word[-1])
        return banned

    def check_sampling(self, plan, step, views):
        rows, shape, starts = plan.rows, step.shape, views["query_start"]
        allowed = np.ones((shape.rows, VOCAB), bool)
        if step.bitmask is not None:
            assert step.bitmask.shape == (shape.rows, 2) and step.bitmask.dtype == np.uint32
            allowed = np.unpackbits(step.bitmask.view(np.uint8), axis=-1, bitorder="little")[:, :VOCAB] == 1
        for r, row in enumerate(rows):
            if row.samples:
                assert set(np.flatnonzero(~allowed[r])) == self.banned(row)
        assert allowed[len(rows) :].all()
        targets = np.full(shape.tokens, -1)
        for r, row in enumerate(rows):
            if row.sequence.index == 0 and row.sequence.request.params.prompt_logprobs is not None:
                for t, position in enumerate(range(row.start, row.start + row.count), start=starts[r]):
                    if position + 1 < row.sequence.num_prompt:
                        targets[t] = row.sequence.request.prompt_token_ids[position + 1]
        assert step.wants_prompt_logprobs == (targets >= 0).any()
        wants = [row.sequence.request.params.logprobs is not None for row in rows]
        assert step.wants_logprobs == any(wants)
        if shape.prompt_targets:
            np.testing.assert_array_equal(views["prompt_targets"], targets)
        else:
            assert (targets == -1).all()
        plain = [row.sequence.request.params.greedy and not self.params.columns["adjusts"][row.slot] for row in rows]
        needed = "greedy" if all(plain) and step.bitmask is None else "sampled"
        if any(wants) or step.wants_prompt_logprobs:
            needed = "full"
        able = [name for name in SAMPLERS if any(s.sampler == name for s in self.ladder)]
        assert shape.sampler == next(name for name in able if SAMPLERS.index(name) >= SAMPLERS.index(needed))
        if shape.sampler == "greedy":
            return
        for r, row in enumerate(rows):
            params = row.sequence.request.params
            for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
                assert views[name][r] == np.float32(getattr(params, name))
            assert views["temperature"][r] == np.float32(params.temperature)
            assert views["top_k"][r] == max(params.top_k, 0) and views["wants_logprobs"][r] == wants[r]
            assert views["seeds"][r] == (0 if params.greedy else sample_seed(params.seed, row.sequence.index))
            single = any(len(word) == 1 for word in row.sequence.request.bad_word_token_ids)
            penalises = params.presence_penalty != 0 or params.repetition_penalty != 1
            assert views["adjusts"][r] == (single or penalises)
        for name, _ in SAMPLING_FIELDS:
            assert not views[name][len(rows) :].any()

    def sample(self, plan, views):
        tokens = []
        for r, row in enumerate(plan.rows):
            token = self.rng.choice([t for t in range(VOCAB) if t not in self.banned(row)])
            if views["samples"][r]:
                self.truth[row.sequence].append(token)
                self.last_token[row.slot] = token
            tokens.append(token)
        return tokens


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(0, 2),
    page_size=st.sampled_from([4, 5, 8]),
    num_pages=st.sampled_from([26, 40, 200]),  # the longest request needs 24 of 4 tokens
    budget=st.sampled_from([5, 13, 32, 100]),
    samplers=st.sampled_from([("full",), ("greedy", "full"), ("sampled", "full"), SAMPLERS]),
)
def test_any_plan_is_packed_as_planned(seed, depth, page_size, num_pages, budget, samplers):
    sim = Simulation(seed, depth=depth, page_size=page_size, num_pages=num_pages, budget=budget, samplers=samplers)
    for _ in range(60):
        if sim.rng.random() < 0.25:
            sim.add_random()
        if sim.count and sim.rng.random() < 0.03:
            sim.scheduler.abort(str(sim.rng.randrange(sim.count)))
        sim.step()


def test_random_plans_come_to_everything_that_packing_does():
    """The test above means little if its plans never need what it checks."""
    sims = [Simulation(seed, depth=1, num_pages=40) for seed in range(3)]
    for sim in sims:
        for i in range(120):
            if i % 4 == 0:
                sim.add_random()
            sim.step()
    steps = [step for sim in sims for step in sim.packed]
    seen = {(s.shape.decode, s.shape.sampler) for s in steps}
    assert seen | {(0, "greedy")} == {  # a mixed step in which nobody draws is rare
        (decode, name) for decode in (0, 1) for name in SAMPLERS
    }
    assert any(s.bitmask is not None for s in steps) and any(s.wants_prompt_logprobs for s in steps)
    assert any(s.page_rows for s in steps) and sum(sim.scheduler.num_preemptions for sim in sims)
    assert any((views_of(s, 4)["token_ids"] == -1).any() for s in steps)


def test_cached_prefix_with_more_pages_than_a_step_carries_is_written_as_a_whole_row():
    sim = Simulation(0)
    prompt = list(range(33))  # 8 full pages of 4, and one token
    sim.add(prompt, temperature=0.0, max_tokens=1)
    sim.step(), sim.step()
    sim.add(prompt, temperature=0.0, max_tokens=6)
    plan = sim.step()
    assert [row.count for row in plan.rows] == [1]
    step = sim.packed[-1]
    assert step.shape.decode and step.shape.page_updates(4) < 9
    assert step.page_rows == [(plan.rows[0].slot, plan.rows[0].sequence.pages)]
    pages = list(plan.rows[0].sequence.pages)
    sim.step()
    assert not sim.packed[-1].page_rows and plan.rows[0].sequence.pages == pages, "what is in place is not sent again"


def test_rows_of_pages_that_fit_go_with_the_step_beside_one_that_does_not():
    sim = Simulation(0)
    prompt = list(range(33))
    sim.add(prompt, temperature=0.0, max_tokens=1)
    sim.step(), sim.step()
    for _ in range(2):
        sim.add([30, 31, 32], temperature=0.0, max_tokens=8, ignore_eos=True)
    sim.step(), sim.step()
    sim.add(prompt, temperature=0.0, max_tokens=8)
    plan = sim.step()  # the two old rows begin their second page, the new one brings nine
    assert len(plan.rows) == 3 and len(sim.packed[-1].page_rows) == 1
    views = views_of(sim.packed[-1], 4)
    assert sorted(views["update_slot"][views["update_slot"] != SLOTS]) == sorted(row.slot for row in plan.rows[:2])


def test_one_token_row_that_owes_prompt_logprobs_gets_a_mixed_shape():
    sim = Simulation(0, budget=5)
    for _ in range(4):
        sim.add([1], temperature=0.0, max_tokens=30, ignore_eos=True)
    sim.step()
    sim.add([4, 5, 6], prompt_logprobs=0, temperature=0.0, max_tokens=3, ignore_eos=True)
    plan = sim.step()
    assert [row.count for row in plan.rows] == [1] * 5
    step = sim.packed[-1]
    assert not step.shape.decode and step.wants_prompt_logprobs
    assert views_of(step, 4)["prompt_targets"].tolist() == [-1] * 4 + [5] + [-1] * (step.shape.tokens - 5)


def test_step_takes_the_smallest_shape_that_holds_it():
    sim = Simulation(1)
    for _ in range(3):
        sim.add([1, 2], temperature=0.0, max_tokens=5, ignore_eos=True)
    while (plan := sim.step()) is not None:
        assert sim.packed[-1].shape == choose(sim.ladder, plan.num_tokens, len(plan.rows), sampler="greedy")


@pytest.mark.parametrize("top_k", [VOCAB, 2**31, 2**40])
def test_top_k_of_any_size_is_packed_as_one_that_keeps_all(top_k, make_sequence):
    """SamplingParams accepts it, so the step must: an exception here ends the engine."""
    params = SlotParams(SLOTS, VOCAB)
    params.admit(make_sequence([1], top_k=top_k))
    assert params.columns["top_k"][0] >= VOCAB or params.columns["top_k"][0] == 0


def test_samples_of_one_seed_differ_and_are_those_of_the_seed_alone(make_sequence):
    params = SlotParams(SLOTS, VOCAB)
    for slot in range(3):
        params.admit(make_sequence([1], slot=slot, index=slot, seed=5, n=3))
    seeds = params.columns["seeds"].tolist()[:3]
    assert len(set(seeds)) == 3 and seeds == [sample_seed(5, index) for index in range(3)]
    assert sample_seed(-1, 0) != sample_seed(1, 0)
