import pytest

from jaxserve.scheduling.prefix import PrefixCache, page_hash, root_hash


def test_hash_tells_every_difference_of_root_and_history():
    roots = [root_hash(*parts) for parts in [("", ""), ("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", ""), ("abc",)]]
    assert len(set(roots)) == len(roots)
    pages = [[1, 2], [2, 1], [1, 3], [1 + 2**32, 2]]
    hashes = [page_hash(root, page) for root in roots for page in pages]
    assert len(set(hashes)) == len(hashes)
    assert page_hash(page_hash(roots[0], [1, 2]), [3, 4]) != page_hash(page_hash(roots[0], [1, 3]), [3, 4])


def test_equal_histories_have_equal_hashes_of_128_bits():
    one, other = (page_hash(page_hash(root_hash("s", "a"), [1, 2]), [3, 4]) for _ in range(2))
    assert one == other and len(one) == 16


def test_known_hash_keeps_its_first_page():
    cache = PrefixCache()
    cache.register(b"h", 3)
    cache.register(b"h", 4)
    assert cache.lookup(b"h") == 3 and 3 in cache and 4 not in cache and len(cache) == 1


def test_page_cannot_hold_two_prefixes():
    cache = PrefixCache()
    cache.register(b"h", 3)
    with pytest.raises(AssertionError, match="page 3"):
        cache.register(b"g", 3)


def test_eviction_takes_the_page_retired_longest_ago():
    cache = PrefixCache()
    for page in (1, 2, 3):
        cache.register(bytes([page]), page)
    for page in (2, 1, 3):
        cache.retire(page)
    cache.revive(2)
    cache.retire(2)
    assert cache.evictable_pages == [1, 3, 2]
    assert [cache.evict() for _ in range(3)] == [1, 3, 2]
    assert len(cache) == 0 and cache.lookup(b"\x01") is None
    with pytest.raises(KeyError):
        cache.evict()


def test_reset_forgets_all_and_hands_back_only_what_nobody_holds():
    cache = PrefixCache()
    cache.register(b"a", 1)
    cache.register(b"b", 2)
    cache.retire(2)
    assert cache.reset() == [2]
    assert cache.lookup(b"a") is None and 1 not in cache and cache.num_evictable == 0


def test_unregistered_page_is_neither_found_nor_evictable():
    cache = PrefixCache()
    cache.register(b"a", 1)
    cache.retire(1)
    assert cache.unregister(b"a") == 1 and cache.unregister(b"a") is None
    assert cache.num_evictable == 0 and cache.lookup(b"a") is None
