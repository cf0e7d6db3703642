"""A request that goes on where it stood, on a scheduler that never saw it before, and deadlines that cannot be met."""

from dataclasses import replace

import pytest

from jaxserve.errors import RequestTooLargeError
from jaxserve.request import SampleProgress


def resumed(request, truths, counts):
    """`request` after sample i had generated counts[i] tokens; None = all of them."""
    progress = []
    for truth, count in zip(truths, counts, strict=True):
        done = count is None
        progress.append(SampleProgress(tuple(truth.generated if done else truth.generated[:count]), done))
    return replace(request, progress=tuple(progress))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("counts", [(0, 3, 7), (5, None, 1), (None, None, 2)])
@pytest.mark.parametrize(
    "sampling", [{"ignore_eos": True}, {}, {"bad_words": ((3, 4),)}], ids=["length", "stop", "sync"]
)
def test_resumed_samples_generate_exactly_the_rest(simulation, make_request, depth, counts, sampling):
    request = make_request("a", [1, 2, 3, 4, 5, 6], n=3, max_tokens=12, logprobs=0, **sampling)
    whole = simulation()
    whole.add(request)
    whole.run()
    truths = [whole.alone["a", i] for i in range(3)]
    if any(count is not None and count >= len(truth.generated) for truth, count in zip(truths, counts, strict=True)):
        counts = tuple(None if c is None else min(c, len(t.generated) - 1) for t, c in zip(truths, counts, strict=True))
    sim = simulation(depth=depth, max_num_batched_tokens=8)
    sim.add(make_request("other", [9] * 5, max_tokens=20, ignore_eos=True))
    sim.add(resumed(request, truths, counts))
    sim.run()
    for i, (truth, count) in enumerate(zip(truths, counts, strict=True)):
        if count is None:
            assert sim.said["a", i] == []
        else:
            assert sim.generated("a", i) == truth.generated[count:]
            assert sim.end("a", i) == (truth.finish_reason, truth.stop_reason)


@pytest.mark.parametrize("max_model_len", [10, 12])
def test_sample_that_outgrew_a_smaller_engine_is_refused_and_leaves_nothing(simulation, make_request, max_model_len):
    sim = simulation(max_model_len=max_model_len)
    request = make_request("a", [1, 2, 3, 4], n=2, max_tokens=20, ignore_eos=True)
    progress = (SampleProgress(tuple(range(8)), False), SampleProgress((5,), False))
    with pytest.raises(RequestTooLargeError, match=f"12 tokens.*{max_model_len}"):
        sim.scheduler.add(replace(request, progress=progress))
    assert not sim.scheduler.has_work
    sim.scheduler.add(replace(request, progress=(SampleProgress(tuple(range(8)), True), SampleProgress((5,), False))))
    sim.scheduler.abort("a")
    assert not sim.scheduler.has_work


def test_prompt_logprobs_told_before_are_not_told_again(simulation, make_request):
    sim = simulation(max_num_batched_tokens=4, max_num_seqs=4)
    prompt = list(range(10, 20))
    request = make_request("a", prompt, max_tokens=4, ignore_eos=True, prompt_logprobs=0)
    sim.add(replace(request, progress=(SampleProgress((), False),), prompt_logprobs_sent=5))
    sim.run()
    told = [entry.token_id for output in sim.said["a", 0] for entry in output.prompt_logprobs or []]
    assert told == prompt[6:]


def test_request_that_cannot_have_its_token_in_time_is_ended_before_prefill(simulation, make_request):
    sim = simulation(max_num_batched_tokens=8)
    sim.scheduler.step_seconds = 2.0
    sim.add(make_request("hopeless", [1] * 20, max_tokens=4, deadline=6.5))  # 3 steps from now=1
    sim.add(make_request("short", [2] * 4, max_tokens=4, ignore_eos=True, deadline=1000.0))
    plan = sim.step()
    assert {row.sequence.request.id for row in plan.rows} == {"short"}
    assert sim.end("hopeless") == ("abort", "deadline_exceeded")
    sim.run()


def test_cached_prefix_counts_as_done_where_a_deadline_is_weighed(simulation, make_request):
    sim = simulation(max_num_batched_tokens=8)
    prompt = list(range(20, 40))
    sim.add(make_request("first", prompt, max_tokens=2, ignore_eos=True))
    sim.run()
    sim.scheduler.step_seconds = 2.0
    sim.add(make_request("again", prompt, max_tokens=2, ignore_eos=True, deadline=sim.now + 4.5))
    sim.run()
    assert sim.end("again") == ("length", None)


def test_without_a_deadline_or_a_measured_step_nothing_is_hopeless(simulation, make_request):
    sim = simulation(max_num_batched_tokens=8)
    sim.add(make_request("unmeasured", [1] * 20, max_tokens=1, ignore_eos=True, deadline=4.5))
    sim.run()
    assert sim.end("unmeasured") == ("length", None)
    sim.scheduler.step_seconds = 1e6
    sim.add(make_request("patient", [2] * 20, max_tokens=1, ignore_eos=True))
    sim.run()
    assert sim.end("patient") == ("length", None)
