"""An LLM that answers from a script, for the commands; and whole front ends with a tiny model, for everything else."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

import jaxserve
from jaxserve.request import SamplingParams

T = TypeVar("T")


@dataclass
class Delta:
    text: str
    token_ids: list[int]
    index: int = 0
    finish_reason: str | None = None


@dataclass
class ScriptedLLM:
    """answers: one list of text pieces per call; an exception among them is raised in its place."""

    answers: list[list[Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.2})  # what the checkpoint names
    prompts: list[Any] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    num_open: int = 0  # streams begun and not closed
    closed: bool = False

    def __enter__(self) -> "ScriptedLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        return SamplingParams(**self.defaults | overrides)

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[Delta]:
        self.prompts.append(prompt)
        self.params.append(params)
        self.num_open += 1
        try:
            for piece in self.answers.pop(0):
                if isinstance(piece, BaseException):
                    raise piece
                yield Delta(piece, [1])
        finally:
            self.num_open -= 1


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> ScriptedLLM:
    """What `jaxserve.LLM(**options)` gives the commands in this test."""
    scripted = ScriptedLLM()

    def build(**options: Any) -> ScriptedLLM:
        scripted.options = options
        return scripted

    monkeypatch.setattr(jaxserve, "LLM", build, raising=False)
    return scripted


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """typed(lines): what a person types at input(); a KeyboardInterrupt among them is raised, the end is Ctrl-D."""

    def install(lines: list[Any]) -> None:
        left = iter(lines)

        def read(_prompt: str = "") -> str:
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setitem(sys.modules, "readline", None)  # it would touch the terminal of whoever runs the tests

    return install


class SharedEngine:
    """An engine that outlives the front end that closes it: other tests have it, too."""

    def __init__(self, engine: Any):
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def close(self) -> None:
        pass


class Live:
    """A front end with an engine in this process, on real sockets; its event loop runs on a thread of its own."""

    def __init__(self, llm: Any, settings: dict[str, Any]):
        from server.core.start import engine_info
        from server.frontend.frontend import Frontend
        from server.frontend.local_engine import LocalEngine
        from server.frontend.servers import open_servers
        from server.settings import ServerSettings
        from server.supervision.ports import Ports

        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="live", daemon=True)
        self._thread.start()
        self.settings = ServerSettings(**{"port": 0, "grpc_port": 0, "admin_port": 0, **settings})

        async def start() -> None:
            engine = SharedEngine(LocalEngine(llm._loop, engine_info(llm.config, llm.prepared, llm.startup_times)))
            self.frontend = Frontend(self.settings, llm.config, engine)
            await self.frontend.start()
            await self.frontend.wait_ready()
            self._servers = await open_servers(self.frontend, Ports(rest=0, grpc=0, admin=0))

        self.call(start)
        ports = self._servers.ports
        scheme = "https" if self.settings.ssl_certfile else "http"
        self.rest = f"{scheme}://127.0.0.1:{ports.rest}"
        self.admin = f"http://127.0.0.1:{ports.admin}"
        self.grpc = f"127.0.0.1:{ports.grpc}"
        self.model = self.frontend.model_names[0]
        self.llm = llm

    def call(self, function: Callable[[], Coroutine[Any, Any, T]], timeout: float = 60.0) -> T:
        """Runs a coroutine function on the front end's loop."""
        return asyncio.run_coroutine_threadsafe(function(), self.loop).result(timeout)

    def until(self, condition: Callable[[], Any], timeout: float = 30.0) -> None:
        """Waits until it holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "it never came to hold"
            time.sleep(0.005)

    def assert_idle(self, timeout: float = 30.0) -> None:
        """Waits until nothing is left of any request: no open call, no sample, no page."""
        status = self.frontend.engine
        self.until(lambda: not self.frontend.open_calls, timeout)
        self.until(lambda: not status.status.open_samples, timeout)
        self.until(lambda: status.status.stats.pages_used == 0, timeout)
        assert self.frontend.capacity.samples == self.frontend.capacity.tokens == 0

    def close(self) -> None:
        async def stop() -> None:
            await self._servers.stop(1.0)
            await self.frontend.close()

        self.call(stop)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture(scope="session")
def start_live(make_llm: Callable[..., Any]) -> Iterator[Callable[..., Live]]:
    """start_live(engine={...}, **settings): equal arguments give the same front end; all are closed at the end."""
    started: dict[str, Live] = {}

    def start(engine: dict[str, Any] | None = None, **settings: Any) -> Live:
        key = repr((sorted((engine or {}).items()), sorted(settings.items())))
        if key not in started:
            started[key] = Live(make_llm(**(engine or {})), settings)
        return started[key]

    yield start
    for live in started.values():
        live.close()


@pytest.fixture
def live(start_live: Callable[..., Live]) -> Iterator[Live]:
    """The front end with default settings. Whatever a test does to it, it is idle again in the end."""
    shared = start_live()
    yield shared
    shared.assert_idle()


@pytest.fixture
def start_front(make_llm: Callable[..., Any]) -> Iterator[Callable[..., Live]]:
    """start_front(engine={...}, **settings): a front end for this test alone (the engine may be shared)."""
    started: list[Live] = []

    def start(engine: dict[str, Any] | None = None, **settings: Any) -> Live:
        started.append(Live(make_llm(**(engine or {})), settings))
        return started[-1]

    yield start
    for front in started:
        front.close()
