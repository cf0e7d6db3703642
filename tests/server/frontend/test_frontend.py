"""What both protocols rest on: calls accepted whole or not at all, everything given back, text never in the way."""

import asyncio
import threading
import time
from typing import Any

import pytest

from jaxserve.errors import InvalidRequestError, PromptTooLongError
from jaxserve.request import SamplingParams
from server.errors import ServiceError
from server.frontend import probe
from server.frontend.frontend import CallOptions, Conversation
from server.frontend.generation import Generation

HERE = CallOptions(endpoint="test")
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


async def texts(generation: Generation) -> list[list[str]]:
    """Of every prompt, the text of every sample, put together from deltas."""
    found = [[""] * request.params.n for request in generation.requests]
    async with generation:
        async for batch in generation.deltas():
            for position, delta in batch:
                found[position][delta.index] += delta.text
    return found


def test_deltas_add_up_to_the_outputs(live: Any) -> None:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=30, n=2)

    async def run() -> None:
        streamed = await texts(await live.frontend.generate(["One", "Two words"], params, HERE))
        async with await live.frontend.generate(["One", "Two words"], params, HERE) as generation:
            outputs = await generation.outputs()
        assert streamed == [[sample.text for sample in output.outputs] for output in outputs]

    live.call(run)


def test_server_gives_the_text_the_library_gives(live: Any) -> None:
    async def run() -> list[list[str]]:
        return await texts(await live.frontend.generate(["The quick", [5, 6, 7]], GREEDY, HERE))

    expected = live.llm.generate(["The quick", [5, 6, 7]], GREEDY)
    assert live.call(run) == [[output.outputs[0].text] for output in expected]


def test_one_bad_prompt_refuses_all_and_keeps_nothing(live: Any) -> None:
    async def run() -> None:
        with pytest.raises(InvalidRequestError) as refused:
            await live.frontend.generate(["fine", [99999]], GREEDY, HERE)
        assert refused.value.field == "prompt"

    live.call(run)
    live.assert_idle()


@pytest.mark.parametrize(
    ("prompt", "field"),
    [("a" * 5000, "prompt"), (Conversation(messages=[{"role": "user", "content": "é" * 400}]), "messages")],
)
def test_prompt_that_is_too_long_is_refused_by_its_own_name(live: Any, prompt: Any, field: str) -> None:
    async def run() -> None:
        with pytest.raises(PromptTooLongError) as refused:
            await live.frontend.generate([prompt], GREEDY, HERE)
        assert refused.value.field == field
        assert "256" in str(refused.value)

    live.call(run)


def test_leaving_a_generation_frees_what_it_holds_within_two_steps(live: Any) -> None:
    async def run() -> None:
        engine = live.frontend.engine
        async with await live.frontend.generate(["One", "Two"], LONG, HERE) as generation:
            async for _ in generation.deltas():
                break
            steps = engine.status.steps
        while engine.status.stats.pages_used:
            assert engine.status.steps <= steps + 3  # one may have been under way, and two more
            await asyncio.sleep(0)

    live.call(run)


def test_deadline_ends_a_running_request_with_an_error_of_its_own(live: Any) -> None:
    options = CallOptions(endpoint="test", timeout=0.05)

    async def run() -> None:
        params = SamplingParams(temperature=0.0, max_tokens=250, ignore_eos=True, n=4)
        async with await live.frontend.generate(["One"] * 8, params, options) as generation:
            with pytest.raises(ServiceError) as ended:
                await generation.outputs()
            assert ended.value.code == "deadline_exceeded"

    live.call(run)


def test_deadline_is_kept_even_by_an_engine_that_does_not_move(start_front: Any) -> None:
    front = start_front()

    async def run() -> None:
        front.frontend.engine.submit = lambda requests, sink: None
        began = time.monotonic()
        options = CallOptions(endpoint="test", timeout=0.1)
        async with await front.frontend.generate(["One"], GREEDY, options) as generation:
            with pytest.raises(ServiceError) as ended:
                await generation.outputs()
        assert ended.value.code == "deadline_exceeded" and time.monotonic() >= began + 0.1

    front.call(run)


def test_full_queue_refuses_and_room_comes_back(start_front: Any) -> None:
    front = start_front(max_num_queued_reqs=2)

    async def run() -> None:
        frontend = front.frontend
        async with await frontend.generate(["One"] * 6, LONG, HERE) as generation:
            with pytest.raises(ServiceError) as refused:
                await frontend.generate(["One"], GREEDY, HERE)
            assert refused.value.code == "queue_full" and refused.value.retry_after >= 1
            await generation.outputs()
        async with await frontend.generate(["One"], GREEDY, HERE) as generation:
            await generation.outputs()

    front.call(run, timeout=120)


def test_draining_refuses_what_is_new_and_finishes_what_runs(start_front: Any) -> None:
    front = start_front()

    async def run() -> None:
        frontend = front.frontend
        generation = await frontend.generate(["One"], LONG, HERE)
        frontend.begin_drain()
        assert not frontend.health.ready().ok and frontend.health.live().ok
        with pytest.raises(ServiceError) as refused:
            await frontend.generate(["One"], GREEDY, HERE)
        assert refused.value.code == "draining"
        drained = asyncio.create_task(frontend.drained(60))
        async with generation:
            outputs = await generation.outputs()
        assert len(outputs[0].outputs[0].token_ids) == 200
        await drained

    front.call(run)


def test_drain_timeout_ends_what_still_runs_with_an_error(start_front: Any) -> None:
    front = start_front()

    async def run() -> None:
        generation = await front.frontend.generate(["One"], LONG, HERE)
        front.frontend.begin_drain()

        async def client() -> str:
            async with generation:
                with pytest.raises(ServiceError) as ended:
                    await generation.outputs()
            return ended.value.code

        waiting = asyncio.create_task(client())
        await front.frontend.drained(0.0)
        assert await waiting == "draining"
        assert not front.frontend.open_calls

    front.call(run)


def test_abort_by_any_spelling_of_the_id_ends_the_request(live: Any) -> None:
    async def run() -> None:
        for prefix in ("gen-", "cmpl-", "chatcmpl-", ""):
            async with await live.frontend.generate(["One"], LONG, HERE) as generation:
                live.frontend.abort(prefix + generation.requests[0].id.removeprefix("gen-"))
                (output,) = await generation.outputs()
            assert output.outputs[0].finish_reason == "abort"

    live.call(run)


def test_truncation_keeps_the_side_that_is_asked_for(live: Any) -> None:
    async def run() -> None:
        for side, kept in (("left", [8, 9]), ("right", [5, 6])):
            options = CallOptions(endpoint="test", truncate_prompt_tokens=2, truncation_side=side)
            assert (await live.frontend.encode([5, 6, 7, 8, 9], options))[1] == kept
        everything = CallOptions(endpoint="test", truncate_prompt_tokens=-1)
        assert len((await live.frontend.encode([5] * 1000, everything))[1]) == 255

    live.call(run)


def test_unknown_model_is_refused_with_the_nearest_name(live: Any) -> None:
    assert live.frontend.check_model("") == live.frontend.check_model(live.model) == live.model
    with pytest.raises(ServiceError) as refused:
        live.frontend.check_model("gpt-4")
    assert refused.value.code == "model_not_found" and live.model in str(refused.value)


def test_call_of_many_prompts_leaves_the_loop_to_others_in_between(live: Any) -> None:
    async def run() -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        params = SamplingParams(temperature=0.0, max_tokens=1)
        async with await live.frontend.generate(["One"] * 200, params, HERE):
            assert turns >= 100
        task.cancel()

    live.call(run)


def test_cancelled_before_its_prompt_is_tokenized_a_call_keeps_nothing(start_front: Any) -> None:
    front = start_front()

    async def run() -> None:
        frontend = front.frontend
        go = threading.Event()
        for _ in range(4):  # every thread has something to do
            frontend._workers.submit(go.wait, 30)
        waiting = asyncio.create_task(frontend.generate(["a " * 1200], LONG, HERE))
        await asyncio.sleep(0.05)
        assert frontend.capacity.samples == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go.set()
        assert frontend.capacity.samples == frontend.capacity.tokens == 0
        assert not frontend.open_calls and not frontend.engine.status.open_samples

    front.call(run)


def test_server_is_not_ready_before_it_can_make_tokens_of_text_and_says_so(start_front: Any) -> None:
    front = start_front()

    async def run() -> None:
        frontend = front.frontend
        text, frontend._text = frontend._text, None
        assert not frontend.health.ready().ok and "tokenizer" in frontend.health.ready().cause
        with pytest.raises(ServiceError) as refused:
            await frontend.generate(["One"], GREEDY, HERE)
        assert refused.value.code == "not_ready" and "tokenizer" in str(refused.value)
        frontend._text = text
        assert frontend.health.ready().ok

    front.call(run)


def test_idle_engine_is_asked_for_a_token_even_while_a_client_is_slow_to_read_its_last_ones(
    start_front: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = start_front()
    monkeypatch.setattr(probe, "PROBE_EVERY", 0.01)
    monkeypatch.setattr(probe, "PROBE_AFTER", 0.05)

    async def run() -> None:
        frontend = front.frontend
        async with await frontend.generate(["One"], GREEDY, HERE) as generation:
            await generation.outputs()
            last = frontend.engine.status.last_output
            prober = asyncio.create_task(probe.probe_when_idle(frontend.engine, "gen-", lambda: False))
            while frontend.engine.status.last_output == last:
                await asyncio.sleep(0.01)
            prober.cancel()

    front.call(run)


def test_failure_while_making_text_fails_that_request_only(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with await live.frontend.generate(["One"], LONG, HERE) as broken:
            monkeypatch.setattr(broken._assemblers[broken.requests[0].id][1], "feed", None)
            async with await live.frontend.generate(["Two"], GREEDY, HERE) as fine:
                with pytest.raises(ServiceError) as failed:
                    await broken.outputs()
                assert failed.value.code == "internal_error" and "NoneType" not in str(failed.value)
                assert len((await fine.outputs())[0].outputs[0].token_ids) == 20

    live.call(run)


def test_front_end_never_imports_jax() -> None:
    import subprocess
    import sys

    found = "' '.join({'jax', 'flax', 'transformers'} & set(sys.modules))"
    check = f"import sys, server.frontend.process; sys.exit({found} or None)"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
