"""The runner of a whole engine: nothing is traced or compiled once it is warm, and the pool is what was planned."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import SamplingParams
from jaxserve.engine.build import plan_memory_for

TRACED = "/jax/core/compile/jaxpr_trace_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compile_events():
    """Names of the trace and compile events of this process, as they happen."""
    events: list[str] = []

    def listen(name, seconds, **_):
        if name in (TRACED, COMPILED):
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def workload(llm):
    """Every feature of the sampler and the scheduler at once; returns the outputs, round by round."""
    rng = np.random.default_rng(0)
    length = lambda n: rng.integers(2, 500, n).tolist()  # noqa: E731
    shared = length(81)  # ten full pages: more new entries than a decode step of one row carries
    base = {"max_tokens": 12, "ignore_eos": True}
    rounds = [
        (
            [length(90), length(3), length(20), length(7), length(30), length(9)],
            [
                SamplingParams(**base, temperature=0.0),
                SamplingParams(**base, n=3, seed=1, top_p=0.9, top_k=20, min_p=0.01),
                SamplingParams(**base, logprobs=3, temperature=0.0),
                SamplingParams(**base, prompt_logprobs=2, temperature=0.7),
                SamplingParams(**base, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.5),
                SamplingParams(**base, logit_bias={5: 3.0}, allowed_token_ids=list(range(100))),
            ],
        ),
        (
            [length(5), length(6)],
            [
                SamplingParams(**base, bad_words=["the", "quick brown fox"], temperature=0.0),
                SamplingParams(max_tokens=12, min_tokens=6, stop_token_ids=[3, 4], stop=["zzz"]),
            ],
        ),
        ([shared], [SamplingParams(max_tokens=1, temperature=0.0)]),
        ([shared], [SamplingParams(**base, temperature=0.0)]),
        ([length(9) for _ in range(4)], [SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)] * 4),
    ]
    return [llm.generate(prompts, params) for prompts, params in rounds]


@pytest.fixture
def small_llm(make_llm):
    """Four sequences of 112 tokens at most, in a pool that holds one of them."""
    return make_llm(num_pages=15, max_model_len=112, max_num_batched_tokens=32)


def test_warm_engine_neither_traces_nor_compiles_whatever_is_asked(small_llm, compile_events):
    llm = small_llm
    before = llm.stats()
    compile_events.clear()
    rounds = workload(llm)
    assert compile_events == []
    # The workload did come to what it is there for.
    after = llm.stats()
    assert after.preemptions > before.preemptions
    assert after.steps - before.steps > 4 and rounds[3][0].num_cached_tokens == 80
    assert len(rounds[0][1].outputs) == 3 and rounds[0][2].outputs[0].logprobs and rounds[0][3].prompt_logprobs
    # And the listener does hear, from other threads too.
    probe = jax.jit(lambda x: x * 3 + 1)
    thread = threading.Thread(target=lambda: probe(jnp.zeros(7)).block_until_ready())
    thread.start()
    thread.join()
    assert {TRACED, COMPILED} <= set(compile_events)


def test_pool_slots_and_weights_take_exactly_the_planned_bytes(small_llm):
    runner, plan = small_llm._loop.core.runner, small_llm.memory_plan
    held = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert held(runner._kv) == plan.pool_bytes == plan.num_pages * plan.page_bytes
    assert held(runner._slots) == plan.slot_bytes
    assert held(runner._params) == plan.weight_bytes
    assert (plan.num_pages, plan.pool_tokens) == (15, 14 * 8)


def test_plan_is_the_same_with_programs_from_the_cache(small_llm):
    """What a step needs is read off the compiled program, which a warm start does not compile."""
    warm, cold = plan_memory_for(small_llm.config), small_llm.memory_plan
    assert dataclasses.replace(warm, budget_bytes=cold.budget_bytes) == cold and cold.step_bytes > 0
