"""The engine in another process: the same tokens as in this one, also when that process is killed under load."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from jaxserve.errors import EngineError
from jaxserve.request import Request, SamplingParams, TokenOutput
from server.frontend.remote_engine import RemoteEngine

PROMPTS = [[5, 6, 7, 8, 9], [10] * 40, [11, 12], [13, 14, 15] * 7]
GREEDY = SamplingParams(temperature=0.0, max_tokens=60)
SEEDED = SamplingParams(temperature=0.9, seed=7, max_tokens=60, logprobs=2, n=2)
PENALISED = SamplingParams(
    temperature=0.7, seed=3, max_tokens=60, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2
)
ASKING = SamplingParams(temperature=0.0, max_tokens=60, prompt_logprobs=1)
ALL_PARAMS = [GREEDY, SEEDED, PENALISED, ASKING]


class Collected:
    """What a sink was told, by sample."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.logprobs: dict[tuple[str, int], list[float]] = {}
        self.prompt_logprobs: dict[str, list[float]] = {}
        self.ends: dict[tuple[str, int], tuple[Any, Any]] = {}
        self.error: EngineError | None = None
        self.last: dict[tuple[str, int], TokenOutput] = {}

    def sink(self, message: list[TokenOutput] | EngineError) -> None:
        if isinstance(message, EngineError):
            self.error = message
            return
        for output in message:
            key = (output.request_id, output.index)
            assert key not in self.ends, "told after its end"
            self.tokens.setdefault(key, []).extend(output.token_ids)
            self.logprobs.setdefault(key, []).extend(entry.logprob for entry in output.logprobs or ())
            self.prompt_logprobs.setdefault(output.request_id, []).extend(
                entry.logprob for entry in output.prompt_logprobs or ()
            )
            self.last[key] = output
            if output.finish_reason is not None:
                self.ends[key] = (output.finish_reason, output.stop_reason)

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens.values()))


def requests() -> list[Request]:
    return [
        Request(id=f"r{i}", prompt_token_ids=prompt, params=params, arrival_time=time.monotonic())
        for i, (prompt, params) in enumerate(zip(PROMPTS, ALL_PARAMS, strict=True))
    ]


async def until(condition: Callable[[], Any], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        await asyncio.sleep(0.005)


async def finished(collected: Collected) -> None:
    await until(lambda: len(collected.ends) == sum(p.n for p in ALL_PARAMS) or collected.error)


def undisturbed(llm: Any) -> Collected:
    """The same requests on an engine of this process."""
    collected = Collected()
    llm._loop.submit(requests(), collected.sink)
    while len(collected.ends) < sum(p.n for p in ALL_PARAMS):
        time.sleep(0.01)
    return collected


def same(found: Collected, expected: Collected) -> None:
    assert found.error is None
    assert found.tokens == expected.tokens
    assert found.ends == expected.ends
    assert found.logprobs.keys() == expected.logprobs.keys()
    for key, values in expected.logprobs.items():
        assert found.logprobs[key] == pytest.approx(values, abs=1e-4)
    assert found.prompt_logprobs.keys() == expected.prompt_logprobs.keys()
    for request_id, values in expected.prompt_logprobs.items():
        assert found.prompt_logprobs[request_id] == pytest.approx(values, abs=1e-4)


def test_remote_engine_gives_the_tokens_of_a_local_one_and_resumes_them_after_every_kill(
    start_core: Callable[..., Any], make_llm: Callable[..., Any]
) -> None:
    core = start_core()
    expected = undisturbed(make_llm())

    async def scenario() -> None:
        engine = RemoteEngine(core.address, "test")
        await engine.start()
        info = await engine.wait_ready()
        assert info.limits.max_num_seqs == 4 and info.vocab_size == 512
        quiet = Collected()
        engine.submit(requests(), quiet.sink)
        await finished(quiet)
        same(quiet, expected)

        killed = Collected()
        engine.submit(requests(), killed.sink)
        for kill in range(3):
            count = killed.count
            await until(lambda count=count: killed.count >= count + 20)
            assert len(killed.ends) != sum(p.n for p in ALL_PARAMS)
            await asyncio.to_thread(core.kill)
            await until(lambda: engine.status.phase == "restarting")
            core.start()
            await until(lambda kill=kill: engine.status.restarts == kill + 1)
        await finished(killed)
        same(killed, expected)
        await until(lambda: engine.status.open_samples == 0)
        await until(lambda: engine.status.stats is not None and engine.status.stats.pages_used == 0)
        await engine.close()

    asyncio.run(scenario())
