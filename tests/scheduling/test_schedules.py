"""The laws of batching, over random schedules: however sequences are mixed, each gets what it gets alone."""

from random import Random

import pytest


def random_request(rng: Random, number: int, make_request, now: float):
    shared = [3] * rng.choice([0, 0, 5, 9, 16, 30])  # prefixes that requests have in common
    prompt = shared + [rng.randrange(40) for _ in range(rng.choice([1, 1, 2, 7, 12, 20, 40]))]
    return make_request(
        f"r{number}",
        prompt,
        n=rng.choice([1, 1, 1, 2, 4]),
        max_tokens=rng.choice([1, 2, 8, 24, None]),
        min_tokens=rng.choice([0, 0, 1]),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=rng.choice([(), (), (11, 12)]),
        logprobs=rng.choice([None, 1]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        bad_words=rng.choice([(), (), ((1,),), ((1, 2),)]),
        salt=rng.choice(["", "", "tenant"]),
        adapter=rng.choice(["", "", "lora"]),
        priority=rng.randrange(3),
        deadline=rng.choice([None, None, None, now + rng.randrange(1, 60)]),
    )


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("seed", range(80))
def test_any_schedule_yields_the_tokens_of_each_request_alone(seed, depth, simulation, make_request):
    rng = Random(1000 * depth + seed)
    sim = simulation(
        depth,
        num_pages=rng.choice([26, 33, 60, 200]),  # the largest request needs 24 of 4 tokens
        page_size=rng.choice([4, 4, 5, 8]),
        max_num_seqs=rng.choice([1, 3, 8]),
        max_num_batched_tokens=rng.choice([8, 13, 64]),
        policy=rng.choice(["fcfs", "priority"]),
        enable_prefix_caching=rng.random() < 0.75,
    )
    requests = 0
    for _ in range(rng.choice([60, 120])):
        draw = rng.random()
        if draw < 0.2:
            sim.add(random_request(rng, requests, make_request, sim.now))
            requests += 1
        elif draw < 0.23 and requests:
            index = rng.choice([None, 0, 1])
            sim.hear(sim.scheduler.abort(f"r{rng.randrange(requests)}", index))
        elif draw < 0.24:
            sim.scheduler.reset_prefix_cache()
            sim.scheduler.check()
        elif draw < 0.25:
            sim.fail()
        else:
            sim.step()
    sim.run()
    sim.assert_as_alone()


@pytest.mark.parametrize("depth", [0, 1])
def test_random_schedules_do_preempt_share_and_expire(depth, simulation, make_request):
    """The test above means little if its schedules never come to what they are there for."""
    rng = Random(5)
    sim = simulation(depth, num_pages=26)
    for number in range(40):
        sim.add(random_request(rng, number, make_request, sim.now))
        sim.step()
    sim.run()
    stats = sim.scheduler.stats()
    reasons = {said[-1].finish_reason for said in sim.said.values()}
    assert stats.num_preemptions > 0 and stats.prefix_hit_tokens > 0 and reasons == {"stop", "length", "abort"}
    assert any(row.feedback for plan in sim.plans for row in plan.rows) == (depth > 0)


def test_preempted_sequence_yields_same_tokens(simulation, make_request):
    for depth in (0, 1):
        sim = simulation(depth, num_pages=14, max_model_len=48)
        for i in range(4):
            sim.add(make_request(f"r{i}", [i, 1, 2, 3, 4], max_tokens=40, ignore_eos=True))
        sim.run()
        first, last = sim.said["r3", 0][0], sim.said["r3", 0][-1]
        assert last.preemptions > 0 and (last.scheduled_time, last.cached_tokens) == (first.scheduled_time, 0)
        sim.assert_as_alone()
        assert sim.scheduler.num_preemptions > 0
        assert sim.said["r0", 0][-1].preemptions == 0  # the oldest never gives anything up
        assert sum(said[-1].preemptions for said in sim.said.values()) == sim.scheduler.num_preemptions


def test_oldest_request_computes_every_step_in_a_pool_of_a_tenth_of_the_need(simulation, make_request):
    need = 20 * 12  # pages of 20 requests of 48 tokens
    for depth in (0, 1):
        sim = simulation(depth, num_pages=need // 10 + 1, max_num_seqs=20, max_model_len=48)
        for i in range(20):
            sim.add(make_request(f"r{i}", [i] * 8, max_tokens=40, ignore_eos=True))
        while sim.scheduler.has_work:
            ended = [key for key, said in sim.said.items() if said and said[-1].finish_reason]
            oldest = min(set(sim.said) - set(ended), key=lambda key: int(key[0][1:]))
            sequence = sim.scheduler._roster.samples(oldest[0])[0]
            plan = sim.step()
            if plan is not None and len(sequence.tokens) + sequence.pending < 48:
                assert sequence in [row.sequence for row in plan.rows]
        sim.run()
        sim.assert_as_alone()


def test_failed_step_changes_no_token(simulation, make_request):
    sim = simulation(1, num_pages=20)
    for i in range(5):
        sim.add(make_request(f"r{i}", [i] * 10, n=2, max_tokens=20, prompt_logprobs=0))
    for _ in range(4):
        for _ in range(3):
            sim.step()
        sim.fail()
        assert sim.scheduler.num_running == 0 and sim.scheduler.stats().pages_evictable == 0
    sim.run()
    sim.assert_as_alone()


def test_steps_launched_before_a_failure_are_ignored_after_it(simulation, make_request):
    sim = simulation()
    sim.add(make_request("a", [1, 2, 3], max_tokens=4, ignore_eos=True))
    sim.launch()
    stale = list(sim.launched)
    sim.fail()
    assert sim.scheduler.update(*stale[0]) == []
    sim.run()
    sim.assert_as_alone()
