"""Readiness rests on a token produced lately; where no traffic produces one, it is asked for here."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable

from jaxserve.errors import EngineError
from jaxserve.request import Request, SamplingParams
from server.frontend.engine_client import EngineClient
from server.frontend.health import PROBE_AFTER

PROBE_EVERY = 5.0  # seconds


async def probe_when_idle(engine: EngineClient, id_prefix: str, draining: Callable[[], bool]) -> None:
    """For ever: one token of an engine that is ready, has nothing to do, and produced none for PROBE_AFTER seconds."""
    while True:
        await asyncio.sleep(PROBE_EVERY)
        status = engine.status
        silent_for = time.monotonic() - (status.last_output or 0.0)
        if status.phase != "ready" or status.open_samples or silent_for < PROBE_AFTER or draining():
            continue
        probe = Request(
            id=f"{id_prefix}probe{uuid.uuid4().hex}",
            prompt_token_ids=[0],
            params=SamplingParams(temperature=0.0, max_tokens=1),
            deadline=time.monotonic() + PROBE_AFTER,
        )
        with contextlib.suppress(EngineError):  # its death is told elsewhere
            engine.submit([probe], lambda message: None)
