"""Every unfinished sequence, and the four moves that change what it owns.

    enlist   ->  waiting                       owns nothing
    admit    waiting -> running                a slot, and the pages of what is computed
    requeue  running -> waiting                gives both back, keeps its tokens
    finish   waiting or running -> finished    gives both back and is forgotten

In: requests, and the scheduler's decisions. Out: who waits, who runs, who owns which slot.
"""

from bisect import bisect_left, insort
from operator import attrgetter

from jaxserve.errors import InvalidRequestError
from jaxserve.request import FinishReason, Request
from jaxserve.scheduling.prefix import root_hash
from jaxserve.scheduling.queue import WaitingQueue
from jaxserve.scheduling.sequence import Sequence, Status
from jaxserve.scheduling.tables import PageTables

_by_order = attrgetter("order")


class Roster:
    """Owns sequences, slots and page tables. A move costs O(log sequences + pages given back)."""

    def __init__(self, tables: PageTables, num_slots: int, policy: str) -> None:
        self.tables = tables
        self.waiting = WaitingQueue(policy)
        self.running: list[Sequence] = []  # sorted by `order`
        self.free_slots = list(range(num_slots - 1, -1, -1))
        self._num_slots = num_slots
        self._samples: dict[str, dict[int, Sequence]] = {}  # request id -> sample index -> unfinished sequence
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def samples(self, request_id: str) -> dict[int, Sequence]:
        """The unfinished samples of a request by index, a copy; empty for an unknown id."""
        return dict(self._samples.get(request_id, {}))

    def unfinished(self) -> list[Sequence]:
        """Everyone. O(sequences): for recovery and checks."""
        return [sequence for samples in self._samples.values() for sequence in samples.values()]

    def enlist(self, request: Request, final_length: int, share_prefix: bool) -> None:
        """The request's unfinished samples wait. Raises InvalidRequestError if the id is taken.

        share_prefix: with requests of the same salt and adapter. Otherwise its samples share among themselves only.
        """
        if request.id in self._samples:
            raise InvalidRequestError(f"id={request.id!r} is the id of an unfinished request", "id", request.id)
        root: bytes | None = None
        if share_prefix:
            root = root_hash("shared", request.cache_salt, request.adapter)
        elif request.params.n > 1:
            root = root_hash("private", str(self._arrivals))
        samples = self._samples[request.id] = {}
        for index in request.open_samples:
            order = self.waiting.order(request, self._arrivals)
            self._arrivals += 1
            samples[index] = Sequence(request, index, order, final_length, root)
            self.waiting.push(samples[index])

    def admit(self, sequence: Sequence, cached: list[int], now: float) -> None:
        """The head of the queue runs, starting with the `cached` pages of its prefix."""
        popped = self.waiting.pop()
        assert popped is sequence
        self.tables.start(sequence, cached)
        sequence.status = Status.RUNNING
        sequence.slot = self.free_slots.pop()
        if sequence.scheduled_time is None:
            sequence.scheduled_time = now
            sequence.cached_tokens = sequence.computed
        insort(self.running, sequence, key=_by_order)

    def requeue(self, sequence: Sequence) -> None:
        """It will start over with the tokens it has, and may find its pages in the prefix cache."""
        self._stop_running(sequence)
        sequence.status = Status.WAITING
        self.waiting.push(sequence)

    def finish(self, sequence: Sequence, finish_reason: FinishReason, stop_reason: int | str | None) -> None:
        if sequence.status is Status.RUNNING:
            self._stop_running(sequence)
            sequence.status = Status.FINISHED
        else:
            self.waiting.discard(sequence)
        sequence.finish_reason, sequence.stop_reason = finish_reason, stop_reason
        samples = self._samples[sequence.request.id]
        del samples[sequence.index]
        if not samples:
            del self._samples[sequence.request.id]

    def check(self) -> None:
        """Asserts every invariant. O(everything): for tests and idle checks."""
        unfinished = self.unfinished()
        running = [sequence for sequence in unfinished if sequence.status is Status.RUNNING]
        self.tables.allocator.assert_consistent(unfinished)
        assert self.running == sorted(running, key=_by_order)
        assert len(self.waiting) == len(unfinished) - len(running)
        slots = self.free_slots + [sequence.slot for sequence in running if sequence.slot is not None]
        assert sorted(slots) == list(range(self._num_slots))
        for sequence in unfinished:
            assert 0 <= sequence.pending <= sequence.final_length - len(sequence.tokens)
            assert len(sequence.pages) == self.tables.pages_for(sequence.computed)
            if sequence.status is Status.RUNNING:
                assert sequence.work == 1 or (sequence.work > 1 and not sequence.pending)
            else:
                assert sequence.status is Status.WAITING
                assert sequence.slot is None and sequence.computed == sequence.registered == 0

    def _stop_running(self, sequence: Sequence) -> None:
        """Pages and slot are free at once, even while launched steps use them: a next owner's step runs after those."""
        assert sequence.slot is not None
        del self.running[bisect_left(self.running, sequence.order, key=_by_order)]
        self.free_slots.append(sequence.slot)
        sequence.slot = None
        self.tables.release(sequence)
