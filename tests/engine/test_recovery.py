"""What the engine does when the device, or the engine itself, fails."""

import itertools
import time
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from jaxserve import SamplingParams
from jaxserve.engine import core as core_module
from jaxserve.errors import EngineError, NumericalError

PARAMS = SamplingParams(temperature=0.8, seed=5, max_tokens=20, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(30, 60)), [9] * 17]


@pytest.fixture(params=[0, 1], ids=["synchronous", "overlapped"])
def fragile(request, make_llm):
    """An engine of this test's own kind: others must not meet its failures."""
    return make_llm(overlap=request.param, seed=99)


def fail_launch(monkeypatch, llm, at):
    """The device fails on the given launches (counted from now)."""
    runner = llm._loop.core.runner
    launch, count = runner.launch, iter(range(10**6))

    def failing(plan):
        if next(count) in at:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory (injected)")
        return launch(plan)

    monkeypatch.setattr(runner, "launch", failing)


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_requests_resumed_after_a_device_error_yield_same_tokens(fragile, monkeypatch):
    expected = tokens(fragile.generate(PROMPTS, PARAMS))
    before = fragile.stats().device_failures
    fail_launch(monkeypatch, fragile, at={0, 3, 4, 11})
    assert tokens(fragile.generate(PROMPTS, PARAMS)) == expected
    assert fragile.stats().device_failures - before == 4
    assert fragile.stats().pages_used == 0


def test_failure_while_collecting_loses_no_request(fragile, monkeypatch):
    expected = tokens(fragile.generate(PROMPTS, PARAMS))
    runner = fragile._loop.core.runner
    collect, count = runner.collect, iter(range(10**6))

    def failing(flight):
        if next(count) == 6:
            raise jax.errors.JaxRuntimeError("INTERNAL: injected")
        return collect(flight)

    monkeypatch.setattr(runner, "collect", failing)
    assert tokens(fragile.generate(PROMPTS, PARAMS)) == expected


def test_nan_logits_end_their_own_request_and_the_engine_serves_on(make_llm, monkeypatch):
    llm = make_llm()
    expected = tokens(llm.generate(PROMPTS[:1], PARAMS))
    runner = llm._loop.core.runner
    params = runner._params
    monkeypatch.setattr(
        runner, "_params", type(params)(params.embed * float("nan"), params.layers, params.final_norm, params.lm_head)
    )
    with pytest.raises(NumericalError, match="NaN"):
        llm.generate(PROMPTS[0], PARAMS)
    monkeypatch.setattr(runner, "_params", params)
    assert tokens(llm.generate(PROMPTS[:1], PARAMS)) == expected
    assert llm.stats().pages_used == 0


def test_engine_that_cannot_recover_tells_every_caller(new_llm, monkeypatch):
    llm = new_llm()
    fail_launch(monkeypatch, llm, at=set(range(100)))
    with pytest.raises(EngineError, match="3 device errors in a row.*injected"):
        llm.generate(PROMPTS, PARAMS)
    with pytest.raises(EngineError, match="in a row"):
        llm.generate(PROMPTS, PARAMS)


def test_a_bug_in_the_engine_reaches_the_caller_instead_of_hanging_it(new_llm, monkeypatch):
    llm = new_llm()
    monkeypatch.setattr(llm._loop.core.scheduler, "plan", lambda now: 1 / 0)
    with pytest.raises(EngineError, match="division by zero"):
        llm.generate(PROMPTS, PARAMS)


def test_request_the_scheduler_refuses_ends_alone(make_llm, monkeypatch):
    """As from a front end whose limits are not the core's: the validator is looked past here."""
    llm = make_llm()
    limits = llm.admission._limits
    monkeypatch.setattr(llm.admission, "_limits", replace(limits, max_model_len=10**6, num_pages=10**6))
    with pytest.raises(EngineError, match="maximum context length is 256"):
        llm.generate([PROMPTS[0], [7] * 300], PARAMS)
    assert llm.stats().pages_used == 0
    assert len(tokens(llm.generate(PROMPTS[:1], PARAMS))[0]) == 20


def test_slow_steps_of_the_past_give_up_no_request_of_an_idle_engine(new_llm, monkeypatch):
    llm = new_llm()
    ages = itertools.count(step=1000.0)  # every step looks as if it took longer than the deadline
    clock = SimpleNamespace(perf_counter=lambda: next(ages), monotonic=time.monotonic)
    monkeypatch.setattr(core_module, "time", clock)
    llm.generate(PROMPTS, PARAMS)
    [output] = llm.generate(PROMPTS[:1], PARAMS, timeout=60)
    assert output.outputs[0].finish_reason == "length"
