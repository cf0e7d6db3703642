"""One step of the engine: plan, launch, collect, update. Tokens in, tokens out; no text, no threads.

step n      plan ─► launch ─┐ (device runs)
step n+1    plan ─► launch ─┤─► collect n ─► update n
                            └ overlap: how many launched steps may be uncollected when step() returns
"""

import logging
import time
from collections import deque

import jax

from jaxserve.engine.stats import StepCounters
from jaxserve.errors import EngineError
from jaxserve.request import Request, TokenOutput
from jaxserve.runner.runner import InFlight, Runner
from jaxserve.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # device errors in a row before the engine gives up
RECENT_STEPS = 16


class EngineCore:
    """Not thread-safe: one caller at a time.

    overlap  0: a step's tokens are read before the next is planned; 1: the next step is launched first
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, overlap: int):
        self.scheduler = scheduler
        self.runner = runner
        self.counters = StepCounters()
        self._overlap = overlap
        self._flights: deque[tuple[InFlight, float]] = deque()  # and time.perf_counter() of its launch
        self._last_collected = 0.0
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._failures = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._flights)

    def add(self, request: Request) -> None:
        """Raises InvalidRequestError if the request could never run."""
        if not self.has_work:  # earlier steps tell little about this one, and giving it up for them would measure none
            self._step_seconds.clear()
            self.scheduler.step_seconds = 0.0
        self.scheduler.add(request)
        self.counters.prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: str, index: int | None = None, reason: str = "aborted") -> list[TokenOutput]:
        """Ends a request (or one sample of it) now and frees what it holds; unknown ids are ignored."""
        return self.scheduler.abort(request_id, index, reason)

    def step(self) -> list[TokenOutput]:
        """Launches the next step, if there is one, and returns the outputs of those collected meanwhile.

        A device error loses the pool, not the requests: every sequence starts over from the tokens the host knows.
        Raises EngineError after MAX_FAILURES errors in a row.
        """
        try:
            outputs = self._step()
        except jax.errors.JaxRuntimeError as error:
            self._recover(error)
            return self.scheduler.take_finished()
        self._failures = 0
        return outputs

    def _step(self) -> list[TokenOutput]:
        counters = self.counters
        start = time.perf_counter()
        plan = self.scheduler.plan(time.monotonic())
        counters.plan_seconds += time.perf_counter() - start
        if plan is not None:
            self._flights.append((self.runner.launch(plan), time.perf_counter()))
            counters.count_step(len(plan.rows), plan.num_tokens, self.scheduler.pages_used)
        elif not self._flights:
            outputs = self.scheduler.take_finished()
            assert outputs or not self.scheduler.has_work, "the scheduler has work but plans none"
            return outputs
        outputs = []
        while len(self._flights) > (self._overlap if plan is not None else 0):
            flight, launched = self._flights.popleft()
            result = self.runner.collect(flight)
            start = time.perf_counter()
            self._step_seconds.append(start - max(launched, self._last_collected))
            self._last_collected = start
            self.scheduler.step_seconds = min(self._step_seconds)
            outputs += self.scheduler.update(flight.plan, result)
            counters.update_seconds += time.perf_counter() - start
            if plan is None:
                break  # tokens that just came in may make a plan possible again
        outputs += self.scheduler.take_finished()
        counters.generated_tokens += sum(len(output.token_ids) for output in outputs)
        return outputs

    def _recover(self, error: Exception) -> None:
        self._failures += 1
        self.counters.device_failures += 1
        first_line = str(error).partition("\n")[0]
        logger.error("device error %d of %d: %s", self._failures, MAX_FAILURES, first_line)
        if self._failures >= MAX_FAILURES:
            raise EngineError(f"{self._failures} device errors in a row, the last: {first_line}") from error
        self._flights.clear()
        self.scheduler.recover()
        self.runner.reset()
