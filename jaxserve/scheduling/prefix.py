"""Which page already holds the keys and values of which token prefix.

In: chained hashes of full pages, and the page numbers they were computed into. Out: the page of a hash, and the
pages that only the cache still wants, oldest first.

    hash[i] = blake2b(hash[i-1] + tokens of page i),   hash[-1] = root_hash(what separates one cache user from another)

A hash stands for every token before it, so equal hash means equal prefix. The 128-bit digest suffices without comparing
token ids: an accidental collision among 2**40 pages has a chance of about 2**-49, and none can be searched for offline
because the root is keyed with a secret drawn per process.
"""

import os
from array import array
from collections import OrderedDict
from hashlib import blake2b

DIGEST_BYTES = 16
_SECRET = os.urandom(16)


def root_hash(*parts: str) -> bytes:
    """The hash before the first page; any difference in `parts` gives an unrelated cache."""
    digest = blake2b(digest_size=DIGEST_BYTES, key=_SECRET)
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)  # lengths make ("ab", "c") differ from ("a", "bc")
    return digest.digest()


def page_hash(previous: bytes, tokens: list[int]) -> bytes:
    """The hash of one full page of token ids that follows the page hashed as `previous`."""
    return blake2b(previous + array("q", tokens).tobytes(), digest_size=DIGEST_BYTES).digest()


class PrefixCache:
    """Hash -> page, and the pages that no sequence holds, least recently used first. Every call is O(1) a page."""

    def __init__(self) -> None:
        self.query_tokens = 0  # tokens of admitted sequences that were looked up
        self.hit_tokens = 0  # those of them that were found
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # registered, refcount 0; oldest first

    def __len__(self) -> int:
        return len(self._page_of)

    def __contains__(self, page: int) -> bool:
        return page in self._hash_of

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    @property
    def evictable_pages(self) -> list[int]:
        """Pages held by the cache alone, in the order they will be evicted. O(pages): for checks."""
        return list(self._evictable)

    def lookup(self, digest: bytes) -> int | None:
        return self._page_of.get(digest)

    def register(self, digest: bytes, page: int) -> None:
        """Names what `page` holds. A hash that is already known keeps its first page: sequences share that one."""
        if digest not in self._page_of:
            assert page not in self._hash_of, f"page {page} already holds another prefix"
            self._page_of[digest] = page
            self._hash_of[page] = digest

    def unregister(self, digest: bytes) -> int | None:
        """Forgets a hash; returns its page, if it had one."""
        page = self._page_of.pop(digest, None)
        if page is not None:
            del self._hash_of[page]
            self._evictable.pop(page, None)
        return page

    def retire(self, page: int) -> None:
        """The last sequence let go of a registered page: from now on it may be evicted."""
        self._evictable[page] = None

    def revive(self, page: int) -> None:
        """A sequence took a retired page up again."""
        del self._evictable[page]

    def evict(self) -> int:
        """Forgets the page that was retired first and returns it; raises KeyError when there is none."""
        page, _ = self._evictable.popitem(last=False)
        del self._page_of[self._hash_of.pop(page)]
        return page

    def reset(self) -> list[int]:
        """Forgets every hash; returns the pages that nobody else holds. Statistics stay."""
        pages = list(self._evictable)
        self._evictable.clear()
        self._page_of.clear()
        self._hash_of.clear()
        return pages
