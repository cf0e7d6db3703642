"""Keeps a role alive: it and a policy go in, a sequence of processes comes out until it is retired or given up."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from server.supervision.child import Child, Event, Role, how_it_ended

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """Seconds. After the last of `backoff` fails too, the role is given up."""

    backoff: tuple[float, ...] = (0.0, 1.0, 4.0)  # before the first, second, … restart in a row
    reset_after: float = 60.0  # ready for so long: earlier restarts are forgotten
    core_timeout: float = 60.0  # a core that says nothing for so long is killed
    drain_overrun: float = 5.0  # beyond drain_timeout, and what any other goodbye may take
    tick: float = 1.0  # how often silence is noticed


class FirstStartError(Exception):
    """A role ended before it was ready for the first time. code: what the supervisor exits with."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class Keeper:
    """One role. Everything runs on the event loop.

    on_event      every event of every process of the role
    on_down       the process ended and another will be started; called with what people should know
    before_start  called before each start
    silence       seconds without any event after which the process is killed; None = never
    """

    def __init__(
        self,
        role: Role,
        policy: RestartPolicy,
        *,
        on_event: Callable[[Event], None],
        on_down: Callable[[str], None],
        before_start: Callable[[], None] = lambda: None,
        silence: float | None = None,
    ):
        self.role = role
        self.ready = False  # now
        self.pid: int | None = None  # of the latest process, which may be gone
        self._policy = policy
        self._on_event = on_event
        self._on_down = on_down
        self._before_start = before_start
        self._silence = silence
        self._child: Child | None = None
        self._retired = asyncio.Event()
        self._was_ready = False
        self._ready_at = 0.0
        self._silent = 0.0
        self._said: str | None = None  # what the process said of its own end
        self._hung = False

    async def run(self) -> str | None:
        """Returns None when retired, else why it gave up. Raises FirstStartError, too, instead of restarting."""
        restarts = 0
        while not self._retired.is_set():
            code, ready_for = await self._one_life()
            if self._retired.is_set():
                break
            reason = self._reason(code)
            if not self._was_ready:
                raise FirstStartError(self._said or f"{reason} before it was ready", 2 if code == 2 else 1)
            if ready_for >= self._policy.reset_after:
                restarts = 0
            if restarts == len(self._policy.backoff):
                return f"{reason}, as it did after each of {restarts} restarts"
            delay = self._policy.backoff[restarts]
            restarts += 1
            self._on_down(f"{reason}; restart {restarts} of {len(self._policy.backoff)}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._retired.wait(), delay)
        return None

    def retire(self) -> None:
        """From now on it is not restarted."""
        self._retired.set()

    def send(self, message: Mapping[str, Any]) -> None:
        if self._child is not None:
            self._child.send(message)

    def hang_up(self) -> None:
        if self._child is not None:
            self._child.hang_up()

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    async def _one_life(self) -> tuple[int, float]:
        """(exit code, seconds it was ready) of one process."""
        self._said, self._hung, self._silent = None, False, 0.0
        self._before_start()
        child = self._child = Child(self.role, self._hear)
        self.pid = child.pid
        logger.debug("%s started, pid %d", self.role.name, child.pid)
        # Silence is counted in ticks of this loop and not by the clock: if this process is suspended with Ctrl-Z,
        # what the child said meanwhile lies unread in the pipe, and must not count as silence.
        while not (await asyncio.wait([child.exited], timeout=self._policy.tick))[0]:
            self._silent += self._policy.tick
            if self._silence is not None and self._silent >= self._silence:
                self._hung = True
                child.kill()
        self._child = None
        ready_for = asyncio.get_running_loop().time() - self._ready_at if self.ready else 0.0
        self.ready = False
        return child.exited.result(), ready_for

    def _hear(self, event: Event) -> None:
        self._silent = 0.0
        match event["event"]:
            case "ready":
                self.ready = self._was_ready = True
                self._ready_at = asyncio.get_running_loop().time()
            case "failed":
                self._said = str(event.get("message", ""))
        self._on_event(event)

    def _reason(self, code: int) -> str:
        if self._hung:
            return f"the {self.role.name} gave no sign of life for {self._silence:g} s and was killed"
        return f"the {self.role.name} " + (f"failed: {self._said}" if self._said else how_it_ended(code))
