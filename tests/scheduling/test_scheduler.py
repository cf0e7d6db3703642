"""One law of the scheduler a test, on schedules small enough to follow by hand. Pages hold 4 tokens."""

import pytest

from jaxserve.errors import ConfigError, InvalidRequestError, RequestTooLargeError
from jaxserve.scheduling.plan import StepResult
from jaxserve.scheduling.scheduler import Scheduler


def shape(plan):
    return [(row.sequence.request.id, row.start, row.count) for row in plan.rows]


def test_long_prompt_is_computed_in_chunks_beside_decoding_rows(simulation, make_request):
    sim = simulation(max_num_batched_tokens=10, max_num_seqs=4)
    sim.add(make_request("a", [1, 2, 3], ignore_eos=True, max_tokens=8))
    sim.add(make_request("b", [4] * 20, ignore_eos=True, max_tokens=2))
    assert shape(sim.step()) == [("a", 0, 3), ("b", 0, 7)]
    assert shape(sim.step()) == [("a", 3, 1), ("b", 7, 9)]
    last = sim.step()
    assert shape(last) == [("a", 4, 1), ("b", 16, 4)]
    assert [row.samples for plan in sim.plans for row in plan.rows] == [True, False, True, False, True, True]
    sim.run()
    sim.assert_as_alone()


def test_decoding_rows_have_their_token_before_an_older_prefill_shares_the_rest(simulation, make_request):
    sim = simulation(max_num_batched_tokens=4, max_num_seqs=4, policy="priority")
    sim.add(make_request("b", [1], ignore_eos=True, priority=1))
    sim.add(make_request("c", [2], ignore_eos=True, priority=1))
    sim.step()
    sim.add(make_request("a", [3] * 9, ignore_eos=True, priority=0))
    for start in (0, 2, 4):
        assert shape(sim.step()) == [("b", 1 + start // 2, 1), ("c", 1 + start // 2, 1), ("a", start, 2)]


def test_rows_tell_the_device_only_of_pages_it_has_not_seen(simulation, make_request):
    sim = simulation()
    sim.add(make_request("a", [1] * 7, ignore_eos=True, max_tokens=4))
    seen = []
    while sim.scheduler.has_work:
        plan = sim.step()
        seen += [(row.new_pages_from, len(row.sequence.pages)) for row in plan.rows if row.sequence.pages]
    assert seen == [(0, 2), (2, 2), (2, 3)]  # and a last step, after which the sequence is gone
    assert [row.num_generated for plan in sim.plans for row in plan.rows] == [0, 1, 2, 3]


def test_overlapped_step_reads_its_token_on_the_device_and_stops_at_the_final_length(simulation, make_request):
    sim = simulation(depth=1)
    sim.add(make_request("a", [1, 2], ignore_eos=True, max_tokens=3))
    sim.run()
    assert [(row.start, row.feedback) for plan in sim.plans for row in plan.rows] == [(0, False), (2, True), (3, True)]
    sim.assert_as_alone()


def test_sequence_whose_bad_words_need_the_last_token_waits_for_it(simulation, make_request):
    sim = simulation(depth=1)
    sim.add(make_request("a", [1, 2], bad_words=((3, 4),), ignore_eos=True, max_tokens=4))
    sim.add(make_request("b", [1, 2], ignore_eos=True, max_tokens=4))
    sim.step()
    assert shape(sim.step()) == [("b", 2, 1)]
    sim.run()
    sim.assert_as_alone()
    assert not any(row.feedback for plan in sim.plans for row in plan.rows if row.sequence.request.id == "a")


def test_samples_of_one_request_share_its_prompt_in_the_very_step_that_computes_it(simulation, make_request):
    for enable in (True, False):
        sim = simulation(max_num_batched_tokens=64, enable_prefix_caching=enable)
        sim.add(make_request("a", list(range(17)), n=8, max_tokens=2, ignore_eos=True))
        plan = sim.step()
        assert sorted(row.count for row in plan.rows) == [1] * 7 + [17]
        assert sim.scheduler.stats().pages_used == 4 + 8  # the full pages of one prompt, and a last page each
        sim.run()
        sim.assert_as_alone()


def test_request_shares_a_prefix_first_seen_in_the_same_step(simulation, make_request):
    sim = simulation()
    sim.add(make_request("a", [1] * 8 + [2, 3], max_tokens=2, ignore_eos=True))
    sim.add(make_request("b", [1] * 8 + [4], max_tokens=2, ignore_eos=True))
    plan = sim.step()
    assert shape(plan) == [("b", 8, 1), ("a", 0, 10)]
    assert plan.rows[0].sequence.pages[:2] == plan.rows[1].sequence.pages[:2]
    sim.run()
    assert [sim.said[name, 0][-1].cached_tokens for name in "ab"] == [0, 8]
    sim.assert_as_alone()


def test_cached_prompt_still_computes_its_last_token(simulation, make_request):
    sim = simulation()
    for name in "ab":
        sim.add(make_request(name, [1] * 8, max_tokens=1))
        sim.run()
    assert shape(sim.plans[-1]) == [("b", 4, 4)]
    stats = sim.scheduler.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (16, 4)


def test_generated_pages_are_found_by_a_later_turn(simulation, make_request):
    for depth in (0, 1):
        sim = simulation(depth)
        sim.add(make_request("a", [1, 2, 3], max_tokens=10, ignore_eos=True))
        sim.run()
        turn = [1, 2, 3, *sim.generated("a"), 5]
        sim.add(make_request("b", turn, max_tokens=2))
        sim.run()
        assert sim.said["b", 0][-1].cached_tokens == 12  # 12 of the 13 tokens before: the 13th was never computed
        sim.assert_as_alone()


@pytest.mark.parametrize("other", [{"salt": "t"}, {"adapter": "l"}])
def test_salt_and_adapter_keep_prefixes_apart(other, simulation, make_request):
    sim = simulation()
    for name, kwargs in (("a", {}), ("b", other), ("c", other)):
        sim.add(make_request(name, [1] * 9, max_tokens=1, **kwargs))
        sim.run()
    assert [sim.said[name, 0][-1].cached_tokens for name in "abc"] == [0, 0, 8]


def test_requests_share_nothing_with_prefix_caching_off(simulation, make_request):
    sim = simulation(enable_prefix_caching=False)
    for name, n in (("a", 1), ("b", 1), ("c", 2), ("d", 2)):
        sim.add(make_request(name, [1] * 9, n=n, max_tokens=1))
    sim.run()
    assert [sim.said[name, 0][-1].cached_tokens for name in "abcd"] == [0, 0, 0, 0]
    assert [sim.said[name, 1][-1].cached_tokens for name in "cd"] == [8, 8]


def test_prompt_logprobs_are_computed_not_found_and_leave_the_prefix_for_others(simulation, make_request):
    sim = simulation()
    for name, wanted in (("a", None), ("b", 0), ("c", None)):
        sim.add(make_request(name, [1] * 9, max_tokens=1, prompt_logprobs=wanted))
        sim.run()
    assert [sim.said[name, 0][-1].cached_tokens for name in "abc"] == [0, 0, 8]
    sim = simulation()
    sim.add(make_request("b", [1] * 9, n=2, max_tokens=1, prompt_logprobs=0))
    sim.run()
    assert [sim.said["b", index][-1].cached_tokens for index in (0, 1)] == [0, 8]
    sim.assert_as_alone()


def test_chunk_that_samples_nothing_still_tells_its_prompt_logprobs(simulation, make_request):
    sim = simulation(max_num_batched_tokens=8)
    sim.add(make_request("a", list(range(12)), max_tokens=1, prompt_logprobs=0, logprobs=0))
    sim.step()
    (output,) = sim.said["a", 0]
    assert output.token_ids == [] and output.finish_reason is None
    assert [lp.token_id for lp in output.prompt_logprobs] == list(range(1, 9))
    sim.run()
    sim.assert_as_alone()


def test_reset_prefix_cache_lets_nothing_be_found(simulation, make_request):
    sim = simulation()
    sim.add(make_request("a", [1] * 9, max_tokens=1))
    sim.run()
    assert sim.scheduler.stats().pages_evictable == 2
    sim.scheduler.reset_prefix_cache()
    stats = sim.scheduler.stats()
    assert stats.pages_evictable == 0 and stats.pages_free == 32
    sim.add(make_request("b", [1] * 9, max_tokens=1))
    sim.run()
    assert sim.said["b", 0][-1].cached_tokens == 0


def test_page_pressure_evicts_the_prefix_used_longest_ago_from_its_tail(simulation, make_request):
    sim = simulation(num_pages=9, max_model_len=24)
    for name, token in (("a", 1), ("b", 2), ("a2", 1)):  # two full pages each; the second use makes `a` the newer one
        sim.add(make_request(name, [token] * 9, max_tokens=1))
        sim.run()
    sim.add(make_request("big", [3] * 19, max_tokens=1))  # 5 pages; 4 are free
    sim.run()
    sim.add(make_request("a3", [1] * 9, max_tokens=1))
    sim.step()
    sim.add(make_request("b2", [2] * 9, max_tokens=1))
    sim.run()
    assert [sim.said[name, 0][-1].cached_tokens for name in ("a3", "b2")] == [8, 4]


def test_waiting_request_is_not_overtaken_by_a_smaller_one(simulation, make_request):
    sim = simulation(num_pages=9, max_model_len=32)
    sim.add(make_request("a", [1] * 14, max_tokens=6, ignore_eos=True))
    sim.step()
    sim.add(make_request("big", [2] * 20, max_tokens=2, ignore_eos=True))
    sim.add(make_request("small", [3], max_tokens=2, ignore_eos=True))
    started = []
    while sim.scheduler.has_work:
        plan = sim.step()
        started += [sequence.request.id for sequence in plan.admitted]
    assert started == ["big", "small"]
    sim.assert_as_alone()


def test_request_is_admitted_only_with_a_page_to_spare_unless_nothing_runs(simulation, make_request):
    sim = simulation(num_pages=7, max_model_len=24)
    sim.add(make_request("a", [1, 2], max_tokens=2, ignore_eos=True))
    sim.add(make_request("b", [2] * 17, max_tokens=2, ignore_eos=True))  # 5 of the 5 pages left
    assert shape(sim.step()) == [("a", 0, 2)]
    sim.run()
    sim.add(make_request("whole pool", [3] * 21, max_tokens=3, ignore_eos=True))
    assert shape(sim.step()) == [("whole pool", 0, 21)]
    sim.run()
    sim.assert_as_alone()


def test_blocked_head_is_not_looked_up_again_until_something_it_waits_for_happens(
    simulation, make_request, monkeypatch
):
    sim = simulation(num_pages=33, max_num_seqs=2, max_num_batched_tokens=128, max_model_len=128)
    common = [1] * 80
    sim.add(make_request("first", [*common, 2], max_tokens=1))
    sim.run()
    sim.add(make_request("busy", [3] * 60, max_tokens=40, ignore_eos=True))
    sim.step()
    sim.add(make_request("head", [*common, 4], max_tokens=1))
    looked_up = []
    lookup = sim.scheduler._tables.allocator.prefix.lookup
    monkeypatch.setattr(sim.scheduler._tables.allocator.prefix, "lookup", lambda h: looked_up.append(h) or lookup(h))
    sim.step()
    assert len(looked_up) > 10
    for _ in range(10):
        looked_up.clear()
        sim.step()
        assert sim.scheduler.num_waiting == 1 and len(looked_up) <= 1
    monkeypatch.undo()
    sim.run()
    sim.assert_as_alone()


def test_blocked_head_starts_as_soon_as_pages_suffice(simulation, make_request):
    sim = simulation(num_pages=11, max_model_len=40)
    for name, token in (("a", 1), ("b", 2)):
        sim.add(make_request(name, [token] * 10, n=2, max_tokens=3 if name == "a" else 1, ignore_eos=True))
    sim.add(make_request("c", [3] * 20, max_tokens=1))
    started = []
    while sim.scheduler.has_work:
        plan = sim.step()
        started.append([sequence.request.id for sequence in plan.admitted])
    assert started == [["a", "a", "b", "b"], ["c"], []]
    sim.assert_as_alone()


def test_lower_priority_number_runs_first_and_is_preempted_last(simulation, make_request):
    sim = simulation(num_pages=10, max_model_len=32, policy="priority", max_num_seqs=2)
    for name, priority in (("c", 2), ("a", 0), ("b", 1)):
        sim.add(make_request(name, [priority] * 8, priority=priority, max_tokens=20, ignore_eos=True))
    sim.run()
    started = [sequence.request.id for plan in sim.plans for sequence in plan.admitted]
    assert started[:2] == ["a", "b"] and started[-1] == "c"
    preempted = {key[0]: said[-1].preemptions for key, said in sim.said.items()}
    assert preempted["a"] == 0 and preempted["b"] > 0
    sim.assert_as_alone()


def test_preempted_sequence_in_flight_keeps_the_token_of_its_launched_step(simulation, make_request):
    sim = simulation(depth=1, num_pages=5, max_model_len=16)
    for name, token in (("a", 1), ("b", 2)):
        sim.add(make_request(name, [token] * 3, max_tokens=13, ignore_eos=True))
    for _ in range(7):  # both grow to two pages each, then `a` needs the fifth of four
        sim.launch()
        if len(sim.launched) > 1 and not sim.scheduler.num_preemptions:
            sim.collect()
    assert sim.scheduler.num_preemptions == 1
    sequence = sim.scheduler._roster.samples("b")[0]
    assert sequence.pending == 1 and sequence.computed == 0 and sequence.pages == [] and sequence.slot is None
    known = len(sequence.tokens)
    sim.collect()
    assert len(sequence.tokens) == known + 1 and sequence.pending == 0
    sim.run()
    sim.assert_as_alone()


def test_deadline_ends_waiting_and_running_sequences_and_frees_their_pages(simulation, make_request):
    sim = simulation(max_num_seqs=1)
    sim.add(make_request("running", [1] * 9, max_tokens=50, ignore_eos=True, deadline=3.0))
    sim.add(make_request("waiting", [2], deadline=2.5, n=2))
    sim.add(make_request("patient", [3], max_tokens=2, ignore_eos=True))
    for _ in range(5):
        sim.step()
    assert sim.end("running") == sim.end("waiting", 0) == sim.end("waiting", 1) == ("abort", "deadline_exceeded")
    assert len(sim.generated("running")) == 2 and sim.generated("waiting") == []
    sim.run()
    sim.assert_as_alone()


def test_deadline_is_told_even_if_nothing_is_left_to_plan(make_request):
    scheduler = Scheduler(num_pages=9, page_size=4, max_num_seqs=1, max_num_batched_tokens=4, max_model_len=16)
    scheduler.add(make_request("a", [1], deadline=1.0))
    assert scheduler.plan(1.0) is None and scheduler.has_work
    (output,) = scheduler.take_finished()
    assert output.stop_reason == "deadline_exceeded"
    assert not scheduler.has_work and scheduler.take_finished() == []


def test_deadline_of_a_finished_request_does_not_end_a_later_one_with_its_id(simulation, make_request):
    sim = simulation()
    sim.add(make_request("a", [1], max_tokens=1, deadline=10.0))
    sim.run()
    sim.add(make_request("a", [1], max_tokens=30, ignore_eos=True))
    sim.run()
    assert sim.now > 10 and sim.end("a") == ("length", None)


def test_abort_frees_at_once_wherever_the_sequence_is(simulation, make_request):
    sim = simulation(depth=1, max_num_seqs=2)
    sim.add(make_request("a", [1] * 9, n=3, max_tokens=20, ignore_eos=True))
    sim.launch()
    assert sim.scheduler.abort("nobody") == [] and sim.scheduler.abort("a", 9) == []
    sim.hear(sim.scheduler.abort("a", 1, reason="client_gone"))
    assert sim.end("a", 1) == ("abort", "client_gone") and sim.scheduler.abort("a", 1) == []
    sim.collect()
    assert sim.generated("a", 1) == []
    assert len(sim.scheduler.abort("a")) == 2
    assert not sim.scheduler.has_work and sim.scheduler.stats().pages_used == 0
    sim.scheduler.check()


def test_slot_of_a_finished_sequence_goes_to_the_next_in_line(simulation, make_request):
    sim = simulation(depth=1, max_num_seqs=1)
    for name in "abc":
        sim.add(make_request(name, [ord(name) % 40], max_tokens=3, ignore_eos=True))
    sim.run()
    assert {row.slot for plan in sim.plans for row in plan.rows} == {0}
    sim.assert_as_alone()


def test_nan_logits_end_the_sequence_and_leave_nothing_of_it_in_the_prefix_cache(make_request):
    scheduler = Scheduler(num_pages=9, page_size=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=16)
    scheduler.add(make_request("a", [1] * 9))
    plan = scheduler.plan(0.0)
    (output,) = scheduler.update(plan, StepResult([-1]))
    assert (output.finish_reason, output.stop_reason, output.token_ids) == ("error", "numerical_error", [])
    assert scheduler.stats().pages_free == 8
    scheduler.check()


def test_outputs_carry_the_time_of_first_admission(simulation, make_request):
    sim = simulation(max_num_seqs=1)
    sim.add(make_request("a", [1], max_tokens=2, ignore_eos=True))
    sim.add(make_request("b", [2], max_tokens=1))
    sim.run()
    assert [sim.said[name, 0][-1].scheduled_time for name in "ab"] == [1.0, 3.0]


def test_id_in_use_is_refused_and_free_again_at_the_end(simulation, make_request):
    sim = simulation()
    sim.add(make_request("a", [1], max_tokens=1))
    with pytest.raises(InvalidRequestError, match="id='a'"):
        sim.scheduler.add(make_request("a", [2]))
    sim.run()
    sim.add(make_request("a", [2], max_tokens=1))


def test_refused_request_leaves_no_trace(simulation, make_request):
    sim = simulation(num_pages=4)
    with pytest.raises(RequestTooLargeError):
        sim.scheduler.add(make_request("a", [1] * 9, max_tokens=5, deadline=1.0))
    assert not sim.scheduler.has_work and sim.step() is None


def test_scheduler_refuses_sizes_and_policies_that_cannot_work():
    sizes = dict(num_pages=9, page_size=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=16)
    with pytest.raises(ConfigError, match="max_num_batched_tokens=1"):
        Scheduler(**{**sizes, "max_num_batched_tokens": 1})
    with pytest.raises(ConfigError, match="policy='lifo'"):
        Scheduler(**sizes, policy="lifo")


def test_steps_are_collected_in_order(simulation, make_request):
    sim = simulation(depth=1)
    sim.add(make_request("a", [1], ignore_eos=True))
    sim.launch()
    sim.launch()
    with pytest.raises(AssertionError, match="step 1 collected, not 0"):
        sim.scheduler.update(*sim.launched[1])
