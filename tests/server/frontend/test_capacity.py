"""The bound on accepted work counts everybody's, gives back what it took, and says when to come back."""

from types import SimpleNamespace

import pytest

from server.errors import ServiceError
from server.frontend.capacity import Capacity
from server.frontend.engine_client import EngineStatus
from server.settings import ServerSettings


def engine(slots: int = 4, open_samples: int = 0) -> SimpleNamespace:
    limits = SimpleNamespace(max_num_seqs=slots)
    return SimpleNamespace(info=SimpleNamespace(limits=limits), status=EngineStatus(open_samples=open_samples))


def test_slots_and_queue_are_filled_and_not_one_more():
    capacity = Capacity(ServerSettings(max_num_queued_reqs=2), engine())
    for _ in range(6):
        capacity.reserve(1)
    with pytest.raises(ServiceError) as refused:
        capacity.reserve(1)
    assert refused.value.code == "queue_full" and refused.value.retry_after >= 1
    capacity.release(1, 0, served=True)
    capacity.reserve(1)


def test_request_of_many_samples_is_taken_whole_or_not_at_all():
    capacity = Capacity(ServerSettings(max_num_queued_reqs=2), engine())
    capacity.reserve(4)
    with pytest.raises(ServiceError):
        capacity.reserve(3)
    assert capacity.samples == 4


def test_work_of_other_front_ends_counts():
    shared = engine(open_samples=5)
    capacity = Capacity(ServerSettings(max_num_queued_reqs=2), shared)
    capacity.reserve(1)
    with pytest.raises(ServiceError):
        capacity.reserve(1)
    shared.status = EngineStatus(open_samples=1, open_samples_here=1)  # ours is there, the others' are done
    capacity.reserve(5)


def test_prompt_tokens_are_bounded_where_a_bound_is_set():
    capacity = Capacity(ServerSettings(max_num_queued_tokens=100), engine())
    capacity.reserve_tokens(60)
    with pytest.raises(ServiceError) as refused:
        capacity.reserve_tokens(41)
    assert "max_num_queued_tokens=100" in str(refused.value)
    capacity.release(0, 60, served=True)
    capacity.reserve_tokens(100)
    unbounded = Capacity(ServerSettings(), engine())
    unbounded.reserve_tokens(10**9)


@pytest.mark.parametrize(("slots", "room"), [(4, 4 + 256), (256, 5 * 256)])
def test_queue_is_bounded_by_default(slots, room):
    capacity = Capacity(ServerSettings(), engine(slots))
    capacity.reserve(room)
    with pytest.raises(ServiceError):
        capacity.reserve(1)
