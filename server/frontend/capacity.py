"""The bound on accepted work: who may still queue, and when to come back if not. The engine need not be asked."""

import math
import time
from collections import deque

from jaxserve.errors import InvalidRequestError
from server.errors import ServiceError
from server.frontend.engine_client import EngineClient
from server.settings import ServerSettings

MAX_RETRY_SECONDS = 60.0
RECENT_ENDS = 64


class Capacity:
    """Counts the samples and prompt tokens of this front end's open calls; asked and told on the event loop.

    Other front ends' samples are known from the engine's last message.
    """

    def __init__(self, settings: ServerSettings, engine: EngineClient):
        self._settings = settings
        self._engine = engine
        self.samples = 0
        self.tokens = 0
        self._ends: deque[float] = deque(maxlen=RECENT_ENDS)  # time.monotonic() of the last samples that ended

    def max_samples(self) -> int:
        """Samples that may be open at once, running ones included."""
        info = self._engine.info
        slots = info.limits.max_num_seqs if info is not None else 0
        queued = self._settings.max_num_queued_reqs
        return slots + (max(256, 4 * slots) if queued is None else queued)

    def reserve(self, samples: int) -> None:
        """Takes up room for so many samples. Raises ServiceError queue_full; InvalidRequestError if it never fits."""
        status = self._engine.status
        others = max(0, status.open_samples - status.open_samples_here)
        limit = self.max_samples()
        if samples > limit:
            raise InvalidRequestError(
                f"n: the request has {samples} samples, and this server takes at most {limit} at a time "
                "(max_num_seqs + max_num_queued_reqs)",
                "n",
                samples,
            )
        open_now = self.samples + others
        if open_now + samples > limit:
            raise ServiceError(
                "queue_full",
                f"{open_now} samples are running or queued and this request has {samples}, but at most {limit} may be "
                "(max_num_seqs + max_num_queued_reqs)",
                retry_after=self._until_free(open_now + samples - limit),
            )
        self.samples += samples

    def reserve_tokens(self, tokens: int) -> None:
        """Takes up room for so many prompt tokens. Raises ServiceError queue_full."""
        limit = self._settings.max_num_queued_tokens
        if limit is not None and self.tokens + tokens > limit:
            raise ServiceError(
                "queue_full",
                f"the prompts of open requests have {self.tokens} tokens and this one has {tokens}, but at most "
                f"max_num_queued_tokens={limit} may be open",
                retry_after=self._until_free(1),
            )
        self.tokens += tokens

    def release(self, samples: int, tokens: int, served: bool) -> None:
        """served: they were generated, so their rate tells when room comes."""
        self.samples -= samples
        self.tokens -= tokens
        if served:
            self._ends.extend([time.monotonic()] * samples)

    def _until_free(self, samples: int) -> float:
        """Seconds until so many more samples have ended, at the recent rate."""
        if len(self._ends) < 2:
            return 1.0
        rate = len(self._ends) / max(time.monotonic() - self._ends[0], 1e-3)
        return min(MAX_RETRY_SECONDS, max(1.0, math.ceil(samples / rate)))
