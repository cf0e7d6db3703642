"""Interpreted kernels are many small programs; a process has room for so many memory mappings only."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped() -> Iterator[None]:
    yield
    jax.clear_caches()
