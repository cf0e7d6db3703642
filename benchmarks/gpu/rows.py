"""Measurements as JSON lines: every row names its machine and is on disk the moment it is known.

A run that is killed keeps what it measured, and a run that measures something again wins over the earlier one.
"""

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "numpy",
    "torch",
    "transformers",
)

NAME = "rows.jsonl"

Row = dict[str, Any]


@dataclass(frozen=True)
class RowFile:
    """Where rows go."""

    path: Path
    facts: Row  # of the machine; in every row

    def add(self, part: str, name: str, **values: Any) -> Row:
        """Writes a row and prints it. part, name: what it is about; a later row of the same two replaces it."""
        row = {"part": part, "name": name, **values}
        print(json.dumps(row), flush=True)
        row = self.facts | row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def open_rows(folder: Path, device: str | None = None) -> RowFile:
    """The file of a run in `folder`. device: what the work runs on; None = what JAX finds here."""
    return RowFile(folder / NAME, machine(device))


def machine(device: str | None = None) -> Row:
    """Device, driver, versions, flags, commit and date. COMMIT names the commit where there is no checkout."""
    from report import environment  # which reads these rows in turn

    facts = environment(device, PACKAGES)
    if facts["commit"] == "unknown":
        facts["commit"] = os.environ.get("COMMIT", "unknown")
    return {**facts, "driver": _driver(), "xla_flags": os.environ.get("XLA_FLAGS", "")}


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows, in the order they were first measured; of two with the same device, part and name the later one.

    A line that a killed run left half written is passed over.
    """
    found: dict[tuple[str, str, str], Row] = {}
    for path in sorted(paths):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found[row["device"], row["part"], row["name"]] = row
    return list(found.values())


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ""
    return told[0].strip() if told else ""
