"""The page tables of sequences: how each gets, shares, names and gives up the pages of its tokens.

In: a sequence and how far it shall be computed. Out: `Sequence.pages`, and pages registered in the prefix cache.
"""

from jaxserve.scheduling.pages import PageAllocator
from jaxserve.scheduling.sequence import Sequence


class PageTables:
    """Applies `PageAllocator` and its prefix cache to sequences; the only writer of `pages` and `registered`."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def cached_prefix(self, sequence: Sequence) -> list[int]:
        """The cached pages of its leading tokens, so that at least one token is left to compute."""
        pages: list[int] = []
        if sequence.hash_root is None or sequence.prompt_logprobs_left:  # logprobs come from computing every position
            return pages
        for i in range((len(sequence.tokens) - 1) // self.page_size):
            page = self.allocator.prefix.lookup(sequence.page_hash(i, self.page_size))
            if page is None:
                break
            pages.append(page)
        return pages

    def start(self, sequence: Sequence, cached: list[int]) -> None:
        """A sequence without pages takes up what `cached_prefix` found: so many tokens are computed already."""
        assert not sequence.pages and not sequence.computed
        self.allocator.share(cached)
        sequence.pages = cached
        sequence.registered = len(cached)
        sequence.computed = len(cached) * self.page_size
        if sequence.hash_root is not None:
            self.allocator.prefix.query_tokens += len(sequence.tokens)
            self.allocator.prefix.hit_tokens += sequence.computed

    def grow(self, sequence: Sequence, count: int) -> bool:
        """Pages for `count` tokens after the computed ones; False (and no change) if there are too few."""
        end = sequence.computed + count
        if end > len(sequence.pages) * self.page_size:
            pages = self.allocator.allocate(self.pages_for(end) - len(sequence.pages))
            if pages is None:
                return False
            sequence.pages += pages
        return True

    def register(self, sequence: Sequence) -> None:
        """Names the full pages of known, computed tokens, so that others find them."""
        if sequence.computed < (sequence.registered + 1) * self.page_size or sequence.hash_root is None:
            return  # most often
        full = min(sequence.computed, len(sequence.tokens)) // self.page_size
        while sequence.registered < full:
            i = sequence.registered
            self.allocator.prefix.register(sequence.page_hash(i, self.page_size), sequence.pages[i])
            sequence.registered += 1

    def release(self, sequence: Sequence) -> None:
        """The sequence is left without pages: nothing of it is computed any more."""
        self.allocator.release(sequence.pages)
        sequence.pages = []
        sequence.computed = sequence.registered = 0
