"""Whether this server lives and is ready, and if not, why: from what the engine was last heard to say and do.

Ready means that a request sent now would be served: warmed, not draining, heard lately, no step stuck, a token lately.
Live is laxer: what the supervisor is still mending does not call for a restart from outside.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.frontend.engine_client import EngineClient

HEARD_WITHIN = 5.0  # seconds; the engine process says something every second
STEP_WITHIN = 30.0
TOKEN_WITHIN = 60.0
PROBE_AFTER = 20.0  # without a token the front end asks for one, so that silence means something
NO_TEXT = "the engine is ready, but the tokenizer is still being loaded"
LIVE_FACTOR = 6  # how much longer than for readiness a server counts as alive


@dataclass(frozen=True)
class HealthReport:
    """cause: None where ok, else a sentence that names what is wrong."""

    ok: bool
    cause: str | None
    details: dict[str, Any]


class Health:
    """Asked on the event loop; keeps no state of its own. prepared: whether this front end can take a request."""

    def __init__(self, engine: EngineClient, draining: Callable[[], bool], prepared: Callable[[], bool]):
        self._engine = engine
        self._draining = draining
        self._prepared = prepared

    def live(self) -> HealthReport:
        status = self._engine.status
        if status.phase == "dead":
            return self._report(f"the engine is dead: {status.detail}")
        if status.phase == "ready":
            return self._report(self.silence(LIVE_FACTOR))
        return self._report(None)

    def ready(self) -> HealthReport:
        status = self._engine.status
        if status.phase == "dead":
            return self._report(f"the engine is dead: {status.detail}")
        if self._draining():
            return self._report("the server is draining: it finishes what runs and accepts nothing new")
        if status.phase != "ready":
            return self._report(f"the engine is {status.phase}" + (f": {status.detail}" if status.detail else ""))
        if not self._prepared():
            return self._report("the front end is loading the tokenizer")
        return self._report(self.silence() or self._no_token())

    def silence(self, factor: float = 1) -> str | None:
        """Why the engine seems stuck; None where it does not."""
        status, now = self._engine.status, time.monotonic()
        if (silent := now - status.heard) > HEARD_WITHIN * factor:
            return f"the engine process has said nothing for {silent:.1f} s"
        if status.step_started is not None and (running := now - status.step_started) > STEP_WITHIN * factor:
            return f"one step has been running for {running:.1f} s"
        return None

    def _no_token(self) -> str | None:
        status = self._engine.status
        if status.last_output is None:
            return "the engine has not produced a token yet"
        age = time.monotonic() - status.last_output
        return f"no token was produced for {age:.0f} s" if age > TOKEN_WITHIN else None

    def _report(self, cause: str | None) -> HealthReport:
        status, now = self._engine.status, time.monotonic()
        details = {
            "phase": status.phase,
            "detail": status.detail,
            "draining": self._draining(),
            "heartbeat_age_seconds": round(now - status.heard, 3) if status.heard else None,
            "step_age_seconds": None if status.step_started is None else round(now - status.step_started, 3),
            "token_age_seconds": None if status.last_output is None else round(now - status.last_output, 3),
            "steps": status.steps,
            "restarts": status.restarts,
        }
        return HealthReport(cause is None, cause, details)
