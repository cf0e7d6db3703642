"""The bucket ladder holds every step the scheduler may plan, in the smallest shape there is."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.shapes import StepShape, choose, ladder


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


@given(step=steps(), greedy_shapes=st.booleans(), greedy=st.booleans())
def test_every_step_gets_the_smallest_shape_that_holds_it(step, greedy_shapes, greedy):
    limits, tokens, rows = step
    shapes = ladder(*limits, greedy_shapes=greedy_shapes)
    chosen = choose(shapes, tokens, rows, greedy=greedy)
    assert chosen in shapes and chosen.tokens >= tokens and chosen.rows >= rows
    assert chosen.decode == (tokens == rows)
    assert chosen.sampler == ("greedy" if greedy and greedy_shapes and chosen.decode else "full")
    for shape in shapes:
        if shape.decode == chosen.decode and shape.tokens >= tokens and shape.rows >= rows:
            assert (shape.tokens, shape.rows) >= (chosen.tokens, chosen.rows)


@given(sizes())
def test_one_token_rows_that_want_prompt_logprobs_always_find_a_mixed_shape(limits):
    seqs, _ = limits
    for rows in {1, seqs}:
        assert not choose(ladder(*limits, greedy_shapes=True), rows + 1, rows, greedy=False).decode


@given(sizes())
def test_last_shape_of_the_ladder_holds_any_step(limits):
    seqs, budget = limits
    shapes = ladder(*limits, greedy_shapes=True)
    last = shapes[-1]
    assert last.sampler == "full" and not last.decode
    assert last.tokens >= budget and last.rows == seqs
    assert all(shape.tokens <= last.tokens and shape.rows <= last.rows for shape in shapes)


@given(sizes())
def test_shapes_are_distinct_and_few(limits):
    shapes = ladder(*limits, greedy_shapes=True)
    assert len(set(shapes)) == len(shapes)
    assert len(shapes) <= 2 * (math.log2(limits[0]) + 2) + math.log2(max(limits[1], 32)) + 3
    assert all(1 <= shape.rows <= min(limits[0], shape.tokens) for shape in shapes)
    assert shapes == sorted(shapes, key=lambda shape: (shape.tokens, shape.rows))


@given(sizes())
def test_greedy_shapes_are_decode_shapes_each_beside_its_full_twin(limits):
    without, shapes = ladder(*limits, greedy_shapes=False), ladder(*limits, greedy_shapes=True)
    assert {shape for shape in shapes if shape.sampler == "full"} == set(without)
    twins = {StepShape(shape.tokens, shape.rows, "greedy") for shape in without if shape.decode}
    assert {shape for shape in shapes if shape.sampler == "greedy"} == twins


@given(step=steps(), page_size=st.sampled_from([8, 16, 64]))
def test_no_steps_padding_is_more_than_twice_its_tokens_and_its_rows(step, page_size):
    """The ladder grows by doubling: what is computed in vain stays within a factor."""
    limits, tokens, rows = step
    chosen = choose(ladder(*limits, greedy_shapes=False), tokens, rows, greedy=False)
    assert chosen.tokens < 2 * max(tokens, 4 * rows, 32)
    pages_begun = rows + (0 if chosen.decode else (tokens - rows) // page_size)
    assert chosen.page_updates(page_size) >= pages_begun


def test_step_beyond_the_ladder_is_refused_with_its_size():
    shapes = ladder(4, 64, greedy_shapes=False)
    for tokens, rows in ((65, 4), (64, 5), (5, 5)):
        with pytest.raises(ConfigError, match=f"{tokens} tokens in {rows} rows"):
            choose(shapes, tokens, rows, greedy=False)
