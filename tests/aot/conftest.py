"""Collected by `-m aot` only: importing hopper.py settles for the whole process which compiler JAX uses."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if config.option.markexpr == "aot" else True
