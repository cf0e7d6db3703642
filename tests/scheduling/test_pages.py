from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jaxserve.scheduling.pages import PageAllocator


@dataclass
class Holder:
    pages: list[int] = field(default_factory=list)


def test_waste_page_is_never_handed_out():
    allocator = PageAllocator(5)
    assert sorted(allocator.allocate(4)) == [1, 2, 3, 4]
    assert allocator.num_available == 0 and allocator.num_used == 4


def test_allocation_is_all_or_nothing():
    allocator = PageAllocator(4)
    assert allocator.allocate(4) is None
    assert allocator.num_free == 3
    assert allocator.allocate(0) == []


def test_page_is_free_only_when_its_last_holder_lets_go():
    allocator = PageAllocator(3)
    pages = allocator.allocate(2)
    allocator.share(pages)
    allocator.release(pages)
    assert allocator.num_free == 0 and allocator.in_use(pages[0])
    allocator.release(pages)
    assert allocator.num_free == 2 and not allocator.in_use(pages[0])


def test_tail_pages_are_evicted_before_head_pages_and_old_ones_before_new():
    allocator = PageAllocator(6)
    first, second = allocator.allocate(2), allocator.allocate(3)
    for page in first + second:
        allocator.prefix.register(bytes([page]), page)
    allocator.release(first)
    allocator.release(second)
    assert allocator.num_free == 0 and allocator.num_available == 5
    assert allocator.allocate(5) == [*reversed(first), *reversed(second)]


def test_free_pages_are_used_before_anything_is_evicted():
    allocator = PageAllocator(4)
    cached = allocator.allocate(1)
    allocator.prefix.register(b"h", cached[0])
    allocator.release(cached)
    assert cached[0] not in allocator.allocate(2)
    assert allocator.prefix.lookup(b"h") == cached[0]
    assert allocator.allocate(1) == cached
    assert allocator.prefix.lookup(b"h") is None


def test_consistency_check_sees_a_page_that_leaked():
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    allocator.assert_consistent([Holder(pages)])
    with pytest.raises(AssertionError, match="refcount"):
        allocator.assert_consistent([])
    with pytest.raises(AssertionError, match="refcount"):
        allocator.assert_consistent([Holder(pages), Holder(pages)])


class PageOwnership(RuleBasedStateMachine):
    """Any series of calls leaves every page with exactly one kind of owner."""

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(9)
        self.holders: list[Holder] = []
        self.hashes = 0

    @rule(count=st.integers(0, 9))
    def allocate(self, count):
        available = self.allocator.num_available
        pages = self.allocator.allocate(count)
        assert (pages is None) == (count > available)
        if pages is not None:
            self.holders.append(Holder(pages))

    @rule(data=st.data())
    def register(self, data):
        pages = [page for holder in self.holders for page in holder.pages if page not in self.allocator.prefix]
        if pages:
            self.hashes += 1
            self.allocator.prefix.register(self.hashes.to_bytes(4, "big"), data.draw(st.sampled_from(pages)))

    @rule(data=st.data())
    def share(self, data):
        known = [page for page in range(9) if page in self.allocator.prefix]
        if known:
            pages = data.draw(st.lists(st.sampled_from(known), unique=True))
            self.allocator.share(pages)
            self.holders.append(Holder(pages))

    @rule(data=st.data())
    def release(self, data):
        if self.holders:
            holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
            self.allocator.release(holder.pages)

    @rule(number=st.integers(0, 20))
    def forget(self, number):
        self.allocator.forget([number.to_bytes(4, "big")])

    @rule()
    def reset(self):
        self.allocator.reset_prefix()
        assert self.allocator.prefix.num_evictable == 0

    @invariant()
    def every_page_has_one_owner(self):
        self.allocator.assert_consistent(self.holders)
        held = {page for holder in self.holders for page in holder.pages}
        assert self.allocator.num_used == len(held)


PageOwnership.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPageOwnership = PageOwnership.TestCase
