"""Who owns which page of the KV pool.

In: how many pages are wanted, taken up again, or let go. Out: page numbers. Every page but page 0 (the waste page, that
padding is written to) is at any time in exactly one place:

    free list       nobody wants what it holds                allocate -> sequences
    sequences       refcount = how many hold it               release  -> free list, or, if registered, prefix cache
    prefix cache    registered, refcount 0, oldest first      share, or allocate when none is free -> sequences
"""

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from jaxserve.scheduling.prefix import PrefixCache

WASTE_PAGE = 0


class HoldsPages(Protocol):
    pages: list[int]


class PageAllocator:
    """Refcounted pages 1..num_pages-1 and the prefix cache that may keep those nobody holds. O(1) a page."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages > WASTE_PAGE
        self.num_pages = num_pages
        self.prefix = PrefixCache()
        self._refcount = [0] * num_pages
        self._free = list(range(num_pages - 1, WASTE_PAGE, -1))  # a stack: low numbers leave first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out: free, or held by the prefix cache alone."""
        return len(self._free) + self.prefix.num_evictable

    @property
    def num_used(self) -> int:
        """Pages held by at least one sequence."""
        return self.num_pages - 1 - self.num_available

    def in_use(self, page: int) -> bool:
        return self._refcount[page] > 0

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with refcount 1, evicting cached ones if need be; None (and no change) if there are too few."""
        if count > self.num_available:
            return None
        pages = [self._free.pop() if self._free else self.prefix.evict() for _ in range(count)]
        for page in pages:
            self._refcount[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for pages found in the prefix cache."""
        for page in pages:
            if self._refcount[page] == 0:
                self.prefix.revive(page)
            self._refcount[page] += 1

    def release(self, pages: list[int]) -> None:
        """One holder fewer. Tail pages go first, so they are evicted before the heads they are useless without."""
        for page in reversed(pages):
            self._refcount[page] -= 1
            if self._refcount[page] == 0:
                if page in self.prefix:
                    self.prefix.retire(page)
                else:
                    self._free.append(page)

    def forget(self, digests: Iterable[bytes]) -> None:
        """Drops prefixes whose contents cannot be trusted from the cache; holders keep their pages."""
        for digest in digests:
            page = self.prefix.unregister(digest)
            if page is not None and self._refcount[page] == 0:
                self._free.append(page)

    def reset_prefix(self) -> None:
        """Drops the whole prefix cache; holders keep their pages."""
        self._free.extend(reversed(self.prefix.reset()))

    def assert_consistent(self, sequences: Iterable[HoldsPages]) -> None:
        """Every page but the waste page has exactly one kind of owner. O(pages): for tests and idle checks."""
        held = Counter(page for sequence in sequences for page in sequence.pages)
        free, evictable = set(self._free), set(self.prefix.evictable_pages)
        assert len(free) == len(self._free), "a page is twice in the free list"
        assert WASTE_PAGE not in held and WASTE_PAGE not in free and WASTE_PAGE not in evictable
        assert WASTE_PAGE not in self.prefix, "the waste page is registered"
        for page in range(1, self.num_pages):
            assert self._refcount[page] == held[page], f"page {page}: refcount {self._refcount[page]} != {held[page]}"
            owners = (page in free) + (page in evictable) + (held[page] > 0)
            assert owners == 1, f"page {page} has {owners} owners"
            assert page not in free or page not in self.prefix, f"page {page} is free and registered"
            assert page not in evictable or page in self.prefix, f"page {page} is evictable and not registered"
