"""The packed buffer: what the host writes is what the step reads."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxserve.batch import SamplingState, StepBatch
from jaxserve.runner.layout import SAMPLING_FIELDS, fields, host_views, packed_size, unpack
from jaxserve.shapes import SAMPLERS, StepShape, ladder


@pytest.mark.parametrize("shape", ladder(6, 64, samplers=SAMPLERS), ids=str)
def test_step_reads_exactly_what_the_host_wrote(shape):
    page_size = 8
    buffer, views = host_views(shape, page_size)
    assert buffer.dtype == np.int32 and buffer.size == packed_size(shape, page_size)
    rng = np.random.default_rng(0)
    for view in views.values():
        view.view(np.uint32)[:] = rng.integers(0, 2**32, view.size, dtype=np.uint32)  # any bits, NaN included
    batch, sampling = unpack(jax.device_put(buffer), shape, page_size)
    read = {**vars(batch), **vars(sampling)}
    assert set(read) == set(views)
    for name, view in views.items():
        assert read[name].dtype == view.dtype and read[name].shape == view.shape, name
        assert np.asarray(read[name]).tobytes() == view.tobytes(), name


@pytest.mark.parametrize("shape", ladder(6, 64, samplers=SAMPLERS), ids=str)
def test_views_cover_the_buffer_once(shape):
    buffer, views = host_views(shape, 8)
    for view in views.values():
        view.view(np.int32)[:] += 1
    assert (buffer == 1).all()


def test_fields_are_those_of_the_pytrees_in_order():
    names = [field.name for field in fields(StepShape(32, 4, "full"), 8)]
    pytrees = [f.name for tree in (StepBatch, SamplingState) for f in dataclasses.fields(tree)]
    assert names == pytrees
    assert [f.name for f in dataclasses.fields(SamplingState)][:-1] == [name for name, _ in SAMPLING_FIELDS]


def test_greedy_step_carries_no_sampling_and_only_full_mixed_steps_prompt_targets():
    sizes = {shape: {f.name: f.size for f in fields(shape, 8)} for shape in ladder(4, 32, samplers=SAMPLERS)}
    for shape, size in sizes.items():
        rows = 0 if shape.sampler == "greedy" else shape.rows
        assert all(size[name] == rows for name, _ in SAMPLING_FIELDS)
        assert size["prompt_targets"] == (shape.tokens if shape.sampler == "full" and not shape.decode else 0)
