"""notebooks/quickstart.ipynb from its first cell to its last, and as it lies in the repository: without outputs."""

import os
import re
import socket
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"
PORTS = re.compile(r"^REST, GRPC = \d+, \d+$", re.M)


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: Any) -> str:
    """What stands below a cell that ran."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs]
    return "".join(texts)


def test_notebook_is_kept_without_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert code_cells(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None and cell.metadata == {}
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}


@pytest.mark.serving
def test_notebook_runs_from_first_cell_to_last(
    notebook: Any, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    with socket.socket() as rest, socket.socket() as grpc:
        rest.bind(("127.0.0.1", 0))
        grpc.bind(("127.0.0.1", 0))
        ports = f"REST, GRPC = {rest.getsockname()[1]}, {grpc.getsockname()[1]}"
    changed = 0
    for cell in code_cells(notebook):
        cell.source, count = PORTS.subn(ports, cell.source)
        changed += count
    assert changed == 1, "the notebook names its ports once, so that they can be others here"
    NotebookClient(
        notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    answers = [shown(cell) for cell in code_cells(notebook)]
    assert "Paris" in answers[0]
    over_rest, over_grpc, ended = answers[-3:]
    assert "Paris" in over_rest and over_grpc.startswith(over_rest), "both protocols stream the same greedy answer"
    assert ended == "0", "the server ended as it should"
