"""The memory plan: how many pages, and a refusal that says the numbers and what to change."""

import dataclasses
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jaxserve.config import CacheOptions
from jaxserve.errors import ConfigError, MemoryPlanError
from jaxserve.runner.device import DeviceMemory
from jaxserve.runner.memory import CPU_POOL_BYTES, MemoryPlan, addressable_pages, check_fits, pool_pages, size

MIB = 1 << 20
PLAN = MemoryPlan(
    model="tiny.gguf",
    device="Some Device",
    dtype="bfloat16",
    total_bytes=2000 * MIB,
    budget_bytes=1000 * MIB,
    weight_bytes=300 * MIB,
    slot_bytes=20 * MIB,
    step_bytes=80 * MIB,
    page_bytes=MIB,
    num_pages=601,
    page_size=16,
    max_num_seqs=8,
    max_model_len=4800,
    model_context=8192,
)
MEMORY = DeviceMemory(total=2000 * MIB, budget=1000 * MIB)


def refusal(**changes):
    with pytest.raises(MemoryPlanError) as caught:
        check_fits(dataclasses.replace(PLAN, **changes))
    assert isinstance(caught.value, ConfigError)
    return str(caught.value)


def test_plan_that_fits_to_the_byte_is_accepted():
    check_fits(dataclasses.replace(PLAN, num_pages=600))
    check_fits(dataclasses.replace(PLAN, num_pages=301))  # 300 pages of 16 hold 4800 tokens


def test_pool_too_large_is_refused_with_all_numbers_and_the_settings_of_the_pool():
    message = refusal()
    for part in ("tiny.gguf", "1001.0 MiB", "300.0 MiB", "20.0 MiB", "80.0 MiB", "601.0 MiB", "1000.0 MiB"):
        assert part in message
    assert "lower kv_cache_memory_bytes or num_pages" in message and "Some Device" in message


@pytest.mark.parametrize("fixed", [950 * MIB, 900 * MIB])
def test_model_too_large_is_refused_with_the_settings_that_shrink_it(fixed):
    message = refusal(weight_bytes=fixed, num_pages=2)
    assert size(fixed) in message and "1000.0 MiB" in message
    for setting in ("smaller model or dtype", "max_num_batched_tokens", "max_num_seqs", "memory_utilization"):
        assert setting in message


def test_minimal_pool_that_does_not_fit_is_not_told_to_shrink():
    """Beside everything else there is room for one page only: a smaller pool than two pages is none."""
    message = refusal(weight_bytes=899 * MIB, num_pages=2)
    assert "lower kv_cache_memory_bytes or num_pages" not in message and "memory_utilization" in message


def test_pool_too_small_for_one_sequence_is_refused_with_pages_and_settings():
    message = refusal(num_pages=300)
    for part in ("299 pages", "4784 tokens", "max_model_len=4800", "300 pages", "300.0 MiB"):
        assert part in message
    for setting in ("kv_cache_memory_bytes", "num_pages", "memory_utilization", "lower max_model_len"):
        assert setting in message


def test_pages_given_are_the_pages_taken():
    for platform in ("cpu", "gpu"):
        assert pool_pages(CacheOptions(num_pages=7), MEMORY, platform=platform, page_bytes=MIB, other_bytes=0) == 7


def test_bytes_given_are_never_exceeded():
    for platform in ("cpu", "gpu"):
        cache = CacheOptions(kv_cache_memory_bytes=10 * MIB - 1)
        assert pool_pages(cache, MEMORY, platform=platform, page_bytes=MIB, other_bytes=0) == 9


def test_bytes_given_that_hold_less_than_two_pages_are_refused_with_the_numbers():
    cache = CacheOptions(kv_cache_memory_bytes=2 * MIB - 1)
    with pytest.raises(MemoryPlanError) as caught:
        pool_pages(cache, MEMORY, platform="cpu", page_bytes=MIB, other_bytes=0)
    for part in (f"kv_cache_memory_bytes={2 * MIB - 1}", "1 pages", str(MIB), "raise kv_cache_memory_bytes"):
        assert part in str(caught.value)


def test_cpu_pool_is_one_gibibyte_whatever_the_budget():
    pages = pool_pages(CacheOptions(), MEMORY, platform="cpu", page_bytes=3 * MIB, other_bytes=900 * MIB)
    assert CPU_POOL_BYTES == 1 << 30 and pages == 341
    assert pool_pages(CacheOptions(), MEMORY, platform="cpu", page_bytes=1 << 31, other_bytes=0) == 2


@given(other=st.integers(0, 998 * MIB), page=st.integers(1, 64 * MIB))
def test_gpu_pool_is_what_the_budget_leaves_and_fits_it(other, page):
    pages = pool_pages(CacheOptions(), MEMORY, platform="gpu", page_bytes=page, other_bytes=other)
    assert pages == 2 or pages * page + other <= MEMORY.budget < (pages + 1) * page + other


def test_gpu_pool_without_room_is_the_smallest_and_then_refused():
    pages = pool_pages(CacheOptions(), MEMORY, platform="gpu", page_bytes=MIB, other_bytes=1100 * MIB)
    assert pages == 2
    refusal(num_pages=pages, weight_bytes=1000 * MIB)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MIB, "1.0 MiB"),
        (1 << 30, "1.00 GiB"),
        (5 << 40, "5120.00 GiB"),
    ],
)
def test_size_is_shown_in_the_largest_unit_below_it(count, text):
    assert size(count) == text


def test_table_shows_every_part_and_the_context_that_was_cut():
    stream = io.StringIO()
    Console(file=stream, width=160).print(PLAN.table())
    text = stream.getvalue()
    for part in ("300.0 MiB", "20.0 MiB", "80.0 MiB", "601.0 MiB", "1001.0 MiB", "600 pages", "9,600 tokens"):
        assert part in text
    assert "2.0 sequences of max_model_len=4,800 (the model knows 8,192)" in text


@pytest.mark.parametrize("elements", [2**31 - 1, 2**31, 2**31 + 1, 2**32, 2**32 + 1, 2**36])
def test_float8_pool_is_never_between_two_and_four_gib(elements):
    """There Triton's 32-bit offsets wrap; 16-bit pools of as many elements have 64-bit ones."""
    page = 1 << 11
    pages = -(-elements // page)
    usable = addressable_pages(pages, page, 1)
    assert usable == (2**31 // page if 2**31 < pages * page <= 2**32 else pages)
    assert addressable_pages(pages, page, 2) == pages
