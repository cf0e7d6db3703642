"""The engine in another process: the same tokens as in this one, also when that process is killed under load."""

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from jaxserve.errors import EngineError
from jaxserve.internal.v1.tokens_pb2_grpc import add_TokenStreamServicer_to_server
from jaxserve.request import Request, SamplingParams, TokenOutput
from server.core.service import CoreState, TokenStreamService
from server.core.start import engine_info
from server.frontend.health import Health
from server.frontend.remote_engine import RemoteEngine
from server.frontend.resumable import ResumableRequest

PROMPTS = [[5, 6, 7, 8, 9], [10] * 40, [11, 12], [13, 14, 15] * 7, [16] * 9, [17, 18] * 12]
NO_REPEATS = tuple((token, token) for token in range(512))
GREEDY = SamplingParams(temperature=0.0, max_tokens=60)
SEEDED = SamplingParams(temperature=0.9, seed=7, max_tokens=60, logprobs=2, n=2)
PENALISED = SamplingParams(
    temperature=0.7, seed=3, max_tokens=60, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2
)
ASKING = SamplingParams(temperature=0.0, max_tokens=60, prompt_logprobs=1)
BIASED = SamplingParams(
    temperature=0.8, seed=11, max_tokens=60, min_tokens=40, stop_token_ids=[20, 21, 22], logit_bias={20: 4.0, 30: 3.0}
)
RULED = SamplingParams(temperature=0.9, top_k=5, seed=12, max_tokens=40, ignore_eos=True, n=2, prompt_logprobs=3)
ALL_PARAMS = [GREEDY, SEEDED, PENALISED, ASKING, BIASED, RULED]


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
        Request(
            id=f"r{i}",
            prompt_token_ids=prompt,
            params=params,
            bad_word_token_ids=NO_REPEATS if params is RULED else (),
            arrival_time=time.monotonic(),
        )
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


@dataclass
class Door:
    """A core's door in this process: its stream to the front end named "test" can be cut while the engine lives on."""

    address: str
    service: TokenStreamService
    llm: Any

    def cut(self) -> None:
        if (stream := self.service._streams.get("test")) is not None:  # else the last cut is still being mended
            stream.hang_up()

    def run(self, scenario: Callable[[RemoteEngine], Any]) -> None:
        """Runs it with a front end's engine that is ready; in the end nothing is left in either."""

        async def body() -> None:
            engine = RemoteEngine(self.address, "test")
            await engine.start()
            await engine.wait_ready()
            await scenario(engine)
            await until(lambda: not self.llm._loop.open_samples)
            assert not engine._open
            await engine.close()

        asyncio.run(body())
        assert self.llm.stats().pages_used == 0


@pytest.fixture
def door(make_llm: Callable[..., Any], tmp_path: Path) -> Iterator[Door]:
    llm = make_llm()
    state = CoreState()
    state.ready(llm._loop, engine_info(llm.config, llm.prepared, llm.startup_times))
    server = grpc.server(ThreadPoolExecutor(8))
    service = TokenStreamService(state)
    add_TokenStreamServicer_to_server(service, server)
    address = f"unix:{tmp_path}/engine.sock"
    server.add_insecure_port(address)
    server.start()
    yield Door(address, service, llm)
    server.stop(1.0).wait()


def one(name: str, **params: Any) -> Request:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 200, "ignore_eos": True, **params})
    return Request(id=name, prompt_token_ids=PROMPTS[1], params=sampling, arrival_time=time.monotonic())


def test_stream_that_is_cut_while_the_engine_lives_is_taken_up_without_loss_or_repetition(door: Door) -> None:
    expected = undisturbed(door.llm)

    async def scenario(engine: RemoteEngine) -> None:
        found = Collected()
        engine.submit(requests(), found.sink)
        while len(found.ends) < len(expected.ends):
            count = found.count
            await until(lambda count=count: found.count >= count + 30 or len(found.ends) == len(expected.ends))
            door.cut()
            if found.count % 2:  # sometimes again before it is back
                await asyncio.sleep(0)
                door.cut()
            await until(lambda: engine.status.phase != "ready" or len(found.ends) == len(expected.ends))
        await until(lambda: engine.status.phase == "ready")
        same(found, expected)

    door.run(scenario)


def test_what_one_listener_fails_at_reaches_the_others_all_the_same(door: Door) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        fine, heard = Collected(), []

        def broken(message: Any) -> None:
            heard.append(message)
            raise RuntimeError("a bug")

        engine.submit([one("broken", max_tokens=20)], broken)
        engine.submit([one("fine", max_tokens=20)], fine.sink)
        await until(lambda: fine.ends)
        await until(lambda: not engine._open)
        assert (
            fine.tokens["fine", 0]
            == door.llm.generate([PROMPTS[1]], one("x", max_tokens=20).params)[0].outputs[0].token_ids
        )
        assert sum(len(output.token_ids) for message in heard for output in message) == 20

    door.run(scenario)


def test_sample_aborted_while_no_engine_is_there_ends_at_once_and_the_others_go_on(door: Door) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        found = Collected()
        engine.submit([one("r", n=2), one("gone"), one("gone.1")], found.sink)
        await until(lambda: len(found.tokens) == 4)
        door.cut()
        await until(lambda: engine.status.phase == "restarting")
        engine.abort("r", 0, "stop_string")
        engine.abort("gone", None, "client_gone")
        assert found.ends == {
            ("r", 0): ("abort", "stop_string"),
            ("gone", 0): ("abort", "client_gone"),
            ("gone.1", 0): ("abort", "client_gone"),
        }
        await until(lambda: ("r", 1) in found.ends)
        assert len(found.tokens["r", 1]) == 200

    door.run(scenario)


def test_sample_aborted_just_before_the_stream_is_cut_ends_whether_the_core_heard_of_it_or_not(door: Door) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        for round_ in range(4):
            found = Collected()
            engine.submit([one("r", n=2)], found.sink)
            await until(lambda found=found: len(found.tokens) == 2)
            engine.abort("r", 0, "stop_string")
            await asyncio.sleep(0.002 * round_)
            door.cut()
            await until(lambda found=found: ("r", 1) in found.ends)
            assert found.ends["r", 0] == ("abort", "stop_string")
            assert len(found.tokens["r", 1]) == 200

    door.run(scenario)


def test_request_submitted_while_no_engine_is_there_runs_when_it_is_back(door: Door) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        found = Collected()
        door.cut()
        await until(lambda: engine.status.phase == "restarting")
        engine.submit([one("r", max_tokens=10)], found.sink)
        await until(lambda: found.ends)
        assert len(found.tokens["r", 0]) == 10

    door.run(scenario)


def test_request_that_cannot_be_sent_is_refused_and_stands_in_nobodys_way(door: Door) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        found = Collected()
        with pytest.raises(ValueError):
            engine.submit([one("fine", max_tokens=10), replace(one("unsendable"), priority=2**40)], found.sink)
        door.cut()
        await until(lambda: engine.status.phase == "restarting")
        engine.submit([one("r", max_tokens=10)], found.sink)
        await until(lambda: found.ends)
        assert found.ends == {("r", 0): ("length", None)}

    door.run(scenario)


def test_silence_of_a_front_end_that_was_suspended_is_not_taken_for_the_engines(door: Door) -> None:
    async def scenario(engine: RemoteEngine) -> None:
        health = Health(engine, lambda: False, lambda: True)
        engine._status = replace(engine._status, heard=engine._status.heard - 60)
        assert not health.ready().ok and "said nothing" in health.ready().cause
        engine._awake -= 60  # as after SIGSTOP and SIGCONT
        assert health.ready().ok
        await until(lambda: time.monotonic() - engine._awake < 30)
        assert health.ready().ok

    door.run(scenario)


def test_counts_of_earlier_engines_are_kept_over_every_later_one() -> None:
    held = ResumableRequest(one("r"), lambda message: None)

    def told(cached: int, preemptions: int) -> tuple[int, int]:
        output = TokenOutput(request_id="r", index=0, token_ids=[5], cached_tokens=cached, preemptions=preemptions)
        held.take(output)
        return output.cached_tokens, output.preemptions

    held.resumption()  # before it had said anything
    assert [told(8, 0), told(8, 1)] == [(8, 0), (8, 1)]
    held.resumption()
    assert [told(40, 0), told(40, 2)] == [(8, 1), (8, 3)]
    held.resumption()
    assert told(0, 0) == (8, 3)


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
