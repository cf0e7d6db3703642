"""What a front end knows of the engine: a small interface with two implementations, in this process and remote.

All methods are called on the front end's event loop, and sinks are called there too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from jaxserve.engine.stats import EngineStats
from jaxserve.errors import EngineError
from jaxserve.request import Request, TokenOutput
from jaxserve.scheduling.limits import Limits

Phase = Literal["starting", "planning", "loading", "compiling", "ready", "restarting", "dead"]
Message = list[TokenOutput] | EngineError  # an error is the last message a sink gets
Sink = Callable[[Message], None]


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What an engine that is ready says of itself. JSON can carry all of it."""

    limits: Limits
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_logprobs: int
    device: str  # "cpu", "NVIDIA H200"
    platform: str  # cpu, gpu
    dtype: str
    num_devices: int = 1
    memory_plan: dict[str, Any] = field(default_factory=dict)  # name -> bytes or count, for people
    startup_seconds: dict[str, float] = field(default_factory=dict)  # phase -> seconds
    restarts: int = 0  # engine processes there were before this one


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """The engine at this moment, as far as the front end has heard. Instants are time.monotonic() seconds here."""

    phase: Phase = "starting"
    detail: str = ""  # "5 of 11 steps compiled", why it restarts
    heard: float = 0.0  # when the engine process last said anything
    step_started: float | None = None  # of the step in progress; None = idle
    last_output: float | None = None  # when the last token (of anyone) came
    steps: int = 0
    open_samples: int = 0  # unfinished in the engine, of all front ends
    open_samples_here: int = 0  # of this one
    restarts: int = 0
    stats: EngineStats | None = None


class EngineClient(Protocol):
    """submit / abort / status; see `LocalEngine` and `RemoteEngine`."""

    @property
    def info(self) -> EngineInfo | None:
        """None until the engine was ready for the first time."""
        ...

    @property
    def status(self) -> EngineStatus: ...

    def submit(self, requests: Sequence[Request], sink: Sink) -> None:
        """Queues requests, all before the next step; `sink` gets their outputs. Raises EngineError if it is dead.

        One the scheduler refuses ends with finish_reason "error" and the reason as stop_reason.
        """
        ...

    def abort(self, request_id: str, index: int | None = None, reason: str = "aborted") -> None:
        """Ends a request (of any front end) or one sample; its sink is told. Unknown ids are ignored."""
        ...

    def reset_prefix_cache(self) -> None: ...

    async def start(self) -> None:
        """Begins to listen to the engine; returns at once."""
        ...

    async def wait_ready(self) -> EngineInfo:
        """Raises EngineError if the engine will never be."""
        ...

    async def close(self) -> None: ...
