"""A real engine core process with the tiny model, which tests may kill and start again."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_pages": 129, "page_size": 8, "max_model_len": 256}


class CoreProcess:
    """`python -m server.core`, as a supervisor runs it."""

    def __init__(self, address: str, options: dict[str, Any]):
        self.address = address
        self._hello = {"engine": options, "engine_address": address, "settings": {}}
        self._starts = 0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.core"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(self._hello | {"restarts": self._starts}) + "\n")
        self._starts += 1
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=30)


@pytest.fixture
def start_core(tiny_model: Path, xla_cache: Path, tmp_path: Path) -> Iterator[Callable[..., CoreProcess]]:
    """start_core(**options): a core with the tiny model, its socket in a directory of the test's own."""
    started: list[CoreProcess] = []

    def start(**options: Any) -> CoreProcess:
        base = {
            "model": str(tiny_model),
            "compilation_cache_dir": str(xla_cache),
            "dtype": "float32",
            "show_progress": False,
        }
        started.append(CoreProcess(f"unix:{tmp_path}/engine.sock", {**base, **SMALL, **options}))
        return started[-1]

    yield start
    for core in started:
        core.close()
