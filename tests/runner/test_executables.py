"""The compiled steps: the donated pool is never copied, and the greedy program is the full one without the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.loading.weights import dummy_params
from jaxserve.runner.executables import compile_all, compile_step, trace_step
from jaxserve.runner.layout import host_views
from jaxserve.shapes import StepShape

DECODE, MIXED = (4, 4), (32, 4)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def compiled():
    """compiled(dimensions, size, sampler): the step of that shape; each is compiled once."""
    known = {}

    def get(sizes, size, sampler):
        key = sizes.dtype, sizes.num_pages, size, sampler
        if key not in known:
            known[key] = compile_step(sizes, StepShape(*size, sampler))
        return known[key]

    return get


def usage_of(compiled, sizes, size, sampler):
    """Memory of a step whose whole state is updated in place."""
    usage = compiled(sizes, size, sampler).memory_analysis()
    assert usage.alias_size_in_bytes >= nbytes(sizes.kv_shapes()) + nbytes(sizes.slot_shapes())
    assert usage.output_size_in_bytes - usage.alias_size_in_bytes < 64 << 10
    return usage


@pytest.mark.parametrize(("dtype", "sampler"), [("float32", "full"), ("float32", "greedy"), ("bfloat16", "greedy")])
def test_decode_step_takes_the_same_memory_for_a_pool_64_times_as_large(dimensions, compiled, dtype, sampler):
    """So it never copies the pool, or widens it to another dtype."""
    small, large = (
        usage_of(compiled, dimensions(num_pages=num_pages, dtype=dtype), DECODE, sampler).temp_size_in_bytes
        for num_pages in (64, 4096)
    )
    assert abs(large - small) < 8 << 10


@pytest.mark.parametrize(("size", "sampler"), [(DECODE, "greedy"), (DECODE, "full"), (MIXED, "full")])
def test_step_lowers_for_a_gpu_that_is_not_there(dimensions, size, sampler):
    traced = trace_step(dimensions(dtype="bfloat16", platform="gpu"), StepShape(*size, sampler))
    assert "stablehlo" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_step_takes_a_fraction_of_a_large_pool(dimensions, compiled, dtype):
    sizes = dimensions(num_pages=1 << 17, dtype=dtype)
    assert usage_of(compiled, sizes, MIXED, "full").temp_size_in_bytes < nbytes(sizes.kv_shapes()) / 64


def test_sixteen_bit_pool_is_stored_as_bits_on_cpu_and_sized_alike_everywhere(dimensions):
    for platform, stored in (("cpu", jnp.uint16), ("gpu", jnp.bfloat16)):
        sizes = dimensions(dtype="bfloat16", platform=platform)
        assert sizes.kv_shapes().k.dtype == stored
        assert nbytes(sizes.kv_shapes()) == sizes.num_pages * sizes.page_bytes


def test_missing_programs_are_compiled_and_what_is_ready_is_kept(dimensions):
    sizes, seen = dimensions(), []
    ready = StepShape(32, 2, "full")
    shapes = [StepShape(1, 1, "greedy"), StepShape(2, 2, "greedy"), ready]
    programs = compile_all(
        sizes, shapes, threads=2, progress=lambda *counts: seen.append(counts), ready={ready: "compiled before"}
    )
    assert set(programs.steps) == set(shapes) and programs.steps[ready] == "compiled before"
    assert seen == [(n, 3) for n in (1, 2, 3)]
    for program in (programs.write_page_row, programs.write_logit_row):  # they write in place
        usage = program.memory_analysis()
        assert usage.alias_size_in_bytes == nbytes(sizes.slot_shapes())
        assert usage.temp_size_in_bytes < 8 << 10


def decode_loop(sizes, step, params, sampler, steps):
    """Three sequences in slots 2, 0, 3, decoded from position 0 by device feedback: (tokens, pool, slots)."""
    shape = StepShape(4, 4, sampler)
    blank = lambda tree: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)  # noqa: E731
    kv, slots = blank(sizes.kv_shapes()), blank(sizes.slot_shapes())
    mask = np.full((4 if sampler == "full" else 0, sizes.bitmask_words), 0xFFFFFFFF, np.uint32)
    tokens = []
    for position in range(steps):
        buffer, views = host_views(shape, sizes.page_size)
        views["token_ids"][:3] = [5, 6, 7] if position == 0 else -1
        views["token_row"][:] = np.arange(4)
        views["positions"][:3] = position
        views["query_start"][:] = [0, 1, 2, 3, 3]
        views["kv_lens"][:3] = position + 1
        views["slots"][:] = [2, 0, 3, 4]
        views["samples"][:3] = 1
        views["update_slot"][:] = 4
        if position % sizes.page_size == 0:
            views["update_slot"][:3] = [2, 0, 3]
            views["update_index"][:3] = position // sizes.page_size
            views["update_page"][:3] = 1 + 3 * (position // sizes.page_size) + np.arange(3)
        kv, slots, output = step(params, kv, slots, buffer, mask)
        tokens.append(np.asarray(output.tokens)[:3].tolist())
    return tokens, kv, slots


def test_greedy_program_yields_the_tokens_of_the_full_one(dimensions, compiled):
    sizes = dimensions()
    params = dummy_params(sizes.model, "float32", 0, jax.devices()[0])
    params = jax.tree.map(lambda leaf: leaf * 8, params)  # logits far enough apart
    (greedy, *state), (full, *full_state) = (
        decode_loop(sizes, compiled(sizes, DECODE, sampler), params, sampler, 12) for sampler in ("greedy", "full")
    )
    assert greedy == full and len({token for row in greedy for token in row}) > 3
    kv, slots = state
    np.testing.assert_array_equal(slots.last_token, [greedy[-1][1], 0, greedy[-1][0], greedy[-1][2]])
    np.testing.assert_array_equal(slots.page_table[:, :2], [[2, 5], [0, 0], [1, 4], [3, 6]])
    for mine, theirs in zip(jax.tree.leaves(slots), jax.tree.leaves(full_state[1]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    pool = np.asarray(kv.k).reshape(sizes.model.num_layers, sizes.num_pages, -1)
    written = np.flatnonzero(pool.any(axis=(0, 2)))
    assert set(written) <= set(range(7)) and set(written) >= set(range(1, 7)), "pages of other sequences were written"
