"""The bucket ladder holds every step the scheduler may plan, in the smallest shape there is."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.shapes import SAMPLERS, StepShape, choose, ladder

SETS = [("full",), ("greedy", "full"), ("sampled", "full"), SAMPLERS]


@st.composite
def sizes(draw):
    """(max_num_seqs, max_num_batched_tokens)"""
    seqs = draw(st.one_of(st.integers(1, 40), st.integers(1, 1024)))
    return seqs, draw(st.one_of(st.integers(seqs, seqs + 70), st.integers(seqs, 16384)))


@st.composite
def steps(draw):
    """((max_num_seqs, max_num_batched_tokens), tokens, rows) of a step that the scheduler may plan."""
    seqs, budget = draw(sizes())
    tokens = draw(st.integers(1, budget))
    rows = draw(st.one_of(st.just(min(tokens, seqs)), st.integers(1, min(tokens, seqs))))
    return (seqs, budget), tokens, rows


@given(step=steps(), samplers=st.sampled_from(SETS), sampler=st.sampled_from(SAMPLERS))
def test_every_step_gets_the_smallest_shape_that_holds_it_and_the_least_sampler(step, samplers, sampler):
    limits, tokens, rows = step
    shapes = ladder(*limits, samplers=samplers)
    chosen = choose(shapes, tokens, rows, sampler=sampler)
    assert chosen in shapes and chosen.tokens >= tokens and chosen.rows >= rows
    assert chosen.decode == (tokens == rows)
    assert chosen.sampler == next(s for s in SAMPLERS[SAMPLERS.index(sampler) :] if s in samplers)
    for shape in shapes:
        if shape.decode == chosen.decode and shape.tokens >= tokens and shape.rows >= rows:
            assert (shape.tokens, shape.rows) >= (chosen.tokens, chosen.rows)


@given(sizes())
def test_one_token_rows_that_want_prompt_logprobs_always_find_a_mixed_shape(limits):
    seqs, _ = limits
    for rows in {1, seqs}:
        assert not choose(ladder(*limits, samplers=SAMPLERS), rows + 1, rows, sampler="full").decode


@given(sizes())
def test_last_shape_of_the_ladder_holds_any_step(limits):
    seqs, budget = limits
    shapes = ladder(*limits, samplers=SAMPLERS)
    last = shapes[-1]
    assert last.sampler == "full" and not last.decode
    assert last.tokens >= budget and last.rows == seqs
    assert all(shape.tokens <= last.tokens and shape.rows <= last.rows for shape in shapes)


@given(sizes())
def test_shapes_are_distinct_and_few(limits):
    shapes = ladder(*limits)
    assert len(set(shapes)) == len(shapes)
    assert len(shapes) <= (math.log2(limits[0]) + 2) + math.log2(max(limits[1], 32)) + 3
    assert all(1 <= shape.rows <= min(limits[0], shape.tokens) for shape in shapes)
    assert shapes == sorted(shapes, key=lambda shape: (shape.tokens, shape.rows))


@given(sizes())
def test_every_size_comes_with_every_sampler_the_least_first(limits):
    full = ladder(*limits)
    for samplers in SETS:
        assert ladder(*limits, samplers=samplers) == [
            StepShape(s.tokens, s.rows, name) for s in full for name in samplers
        ]


@given(step=steps(), page_size=st.sampled_from([8, 16, 64]))
def test_no_steps_padding_is_more_than_twice_its_tokens_and_its_rows(step, page_size):
    """The ladder grows by doubling: what is computed in vain stays within a factor."""
    limits, tokens, rows = step
    chosen = choose(ladder(*limits), tokens, rows, sampler="full")
    assert chosen.tokens < 2 * max(tokens, 4 * rows, 32)
    pages_begun = rows + (0 if chosen.decode else (tokens - rows) // page_size)
    assert chosen.page_updates(page_size) >= pages_begun


def test_step_beyond_the_ladder_is_refused_with_its_size():
    shapes = ladder(4, 64)
    for tokens, rows in ((65, 4), (64, 5), (5, 5)):
        with pytest.raises(ConfigError, match=f"{tokens} tokens in {rows} rows"):
            choose(shapes, tokens, rows, sampler="greedy")
