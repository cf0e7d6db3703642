import pytest

from jaxserve.errors import ConfigError
from jaxserve.scheduling.queue import WaitingQueue
from jaxserve.scheduling.sequence import Sequence


@pytest.fixture
def push(make_request):
    def push(queue, arrival, priority=0):
        request = make_request(f"r{arrival}", [1], priority=priority)
        sequence = Sequence(request, 0, queue.order(request, arrival), 8, None)
        queue.push(sequence)
        return sequence

    return push


@pytest.mark.parametrize(("policy", "expected"), [("fcfs", [0, 1, 2, 3]), ("priority", [1, 3, 0, 2])])
def test_order_is_that_of_the_policy_then_of_arrival(policy, expected, push):
    queue = WaitingQueue(policy)
    sequences = [push(queue, arrival, priority=1 - arrival % 2) for arrival in range(4)]
    assert [sequences.index(queue.pop()) for _ in range(4)] == expected
    assert queue.peek() is None and len(queue) == 0


def test_sequence_pushed_back_is_in_front_of_later_ones(push):
    queue = WaitingQueue("fcfs")
    sequences = [push(queue, arrival) for arrival in range(3)]
    queue.push(queue.pop())
    assert queue.peek() is sequences[0] and len(queue) == 3


def test_discarded_sequence_is_never_shown_nor_counted(push):
    queue = WaitingQueue("fcfs")
    sequences = [push(queue, arrival) for arrival in range(3)]
    queue.discard(sequences[1])
    queue.discard(sequences[0])
    assert len(queue) == 1 and queue.peek() is sequences[2]
    queue.discard(sequences[2])
    assert len(queue) == 0 and queue.peek() is None


def test_unknown_policy_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"policy='lifo'.*fcfs, priority"):
        WaitingQueue("lifo")
