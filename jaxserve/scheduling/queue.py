"""The sequences that wait for a slot, and who is next.

In: sequences, each pushed when it arrives or is preempted. Out: always the one that comes first under the policy, so a
preempted sequence, older than those behind it, is in front again by itself.
"""

from collections.abc import Callable
from heapq import heappop, heappush

from jaxserve.errors import ConfigError
from jaxserve.request import Request
from jaxserve.scheduling.sequence import Sequence, Status

ORDERS: dict[str, Callable[[Request, int], tuple[int, int]]] = {
    "fcfs": lambda request, arrival: (0, arrival),
    "priority": lambda request, arrival: (request.priority, arrival),
}


class WaitingQueue:
    """A heap of waiting sequences; a discarded one stays until it comes first. O(log waiting) amortised."""

    def __init__(self, policy: str) -> None:
        if policy not in ORDERS:
            raise ConfigError(f"policy={policy!r} must be one of {', '.join(sorted(ORDERS))}")
        self.order = ORDERS[policy]  # (request, arrival) -> Sequence.order
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, sequence: Sequence) -> None:
        assert sequence.status is Status.WAITING
        heappush(self._heap, (sequence.order, sequence))
        self._length += 1

    def peek(self) -> Sequence | None:
        """The sequence that is next, or None."""
        heap = self._heap
        while heap and heap[0][1].status is not Status.WAITING:
            heappop(heap)
        return heap[0][1] if heap else None

    def pop(self) -> Sequence:
        """Removes and returns the sequence that `peek` showed."""
        sequence = self.peek()
        assert sequence is not None, "nothing waits"
        heappop(self._heap)
        self._length -= 1
        return sequence

    def discard(self, sequence: Sequence) -> None:
        """Takes a waiting sequence out for good: it is finished and never pushed again."""
        assert sequence.status is Status.WAITING
        sequence.status = Status.FINISHED
        self._length -= 1
