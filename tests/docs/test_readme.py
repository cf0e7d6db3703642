"""What README.md and docs/*.md show is run: every block of Python or shell, and the example clients.

A server with the default model is there while they run. Comments right above a block change how:

    <!-- not run: WHY -->          it is not, and everybody can read why
    <!-- continues -->             the Python block before it belongs to it
    <!-- needs: grpcurl ... -->    skipped where one of these programs is not installed

Blocks of Python are programs of their own, those of shell run in the project's folder, where any failing command fails.
`path/to/model` stands for the default model, `.venv` for the environment of the tests, and the default ports for those
of the server, so that the documents can say what people type.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jaxserve.loading.default_model import default_model_path

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
EXAMPLES = tuple(path for path in sorted((ROOT / "examples").glob("*.py")) if path.name != "demo.py")
SHELL = ("sh", "bash")
SHOWN_ONLY = ("text", "json", "yaml", "proto", "promql", "http")
FENCE = re.compile(r"^( *)(```+)([^\n`]*)\n(.*?)^\1\2 *$", re.M | re.S)
COMMENT = re.compile(r"<!-- (not run|continues|needs)(?:: (.*?))? -->")
SECONDS = 550


@dataclass(frozen=True)
class Block:
    """notes: the comments above it. code: of a block that continues another, both."""

    document: str
    line: int
    language: str
    code: str
    notes: dict[str, str]

    def __str__(self) -> str:
        return f"{self.document}:{self.line}-{self.language}"


def blocks(text: str, document: str) -> list[Block]:
    found: list[Block] = []
    for fence in FENCE.finditer(text):
        indent, _, language, code = fence.groups()
        code = re.sub(f"^{indent}", "", code, flags=re.M)
        above = text[: fence.start()].rstrip().splitlines()
        notes: dict[str, str] = {}
        while above and (comment := COMMENT.fullmatch(above.pop().strip())):
            notes[comment[1]] = comment[2] or ""
        if "continues" in notes:
            code = next(block.code for block in reversed(found) if block.language == language) + code
        found.append(Block(document, text.count("\n", 0, fence.start()) + 1, language.strip(), code, notes))
    return found


BLOCKS = [block for path in DOCUMENTS for block in blocks(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())]
RUN = [block for block in BLOCKS if block.language in ("python", *SHELL) and "not run" not in block.notes]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_run_or_says_why_not(block: Block) -> None:
    known = ("python", *SHELL, *SHOWN_ONLY)
    assert block.language in known, f"{block} names no language of {known}, so nobody knows whether to run it"
    assert block in RUN or block.language in SHOWN_ONLY or block.notes["not run"].strip()


def test_comments_about_blocks_stand_above_one() -> None:
    for path in DOCUMENTS:
        text = path.read_text("utf-8")
        written = len(COMMENT.findall(text))
        assert written == sum(len(block.notes) for block in blocks(text, path.name)), path


def test_a_block_is_found_with_its_notes_and_what_it_continues() -> None:
    text = """
```python
a = 1
```

<!-- needs: some program -->
<!-- continues -->
```python
print(a)
```

- in a list
  <!-- not run: it is an example -->

  ```sh
  false
  ```
"""
    first, second, third = blocks(text, "a.md")
    assert (str(first), first.code, first.notes) == ("a.md:2-python", "a = 1\n", {})
    assert (second.code, second.notes) == ("a = 1\nprint(a)\n", {"continues": "", "needs": "some program"})
    assert (third.language, third.code, third.notes) == ("sh", "false\n", {"not run": "it is an example"})


@pytest.mark.serving
@pytest.mark.parametrize("block", RUN, ids=str)
def test_block_runs_as_shown(
    block: Block, here: Callable[[str], str], environment: dict[str, str], tmp_path: Path
) -> None:
    missing = [
        name for name in block.notes.get("needs", "").split() if not shutil.which(name, path=environment["PATH"])
    ]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    code = here(block.code).replace("path/to/model", str(default_model_path()))
    code = code.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    if block.language == "python":
        script = tmp_path / "block.py"
        script.write_text(code, "utf-8")
        command, folder = [sys.executable, str(script)], tmp_path
    else:
        (tmp_path / ".curlrc").write_text("fail-with-body\nshow-error\n")  # else curl is content with any answer
        environment = environment | {"CURL_HOME": str(tmp_path)}
        command, folder = ["bash", "-euo", "pipefail", "-c", code], ROOT
    result = run(command, folder, environment)
    assert result.returncode == 0, f"{code}\n{result.stdout}\n{result.stderr}"


@pytest.mark.serving
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_client_holds_a_conversation(example: Path, addresses: Any, environment: dict[str, str]) -> None:
    address = addresses.grpc if "grpc" in example.name else f"{addresses.rest}/v1"
    said = "What is the capital of France? One word.\nAnd the capital of Italy? One word.\n"
    result = run([sys.executable, str(example), address], ROOT, environment, said)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout and "Rome" in result.stdout, result.stdout


def test_example_clients_fit_on_a_screen() -> None:
    assert {path.name for path in EXAMPLES} >= {"chat_rest.py", "chat_grpc.py"}
    assert all(len(path.read_text("utf-8").splitlines()) <= 40 for path in EXAMPLES)


def run(
    command: list[str], folder: Path, environment: dict[str, str], said: str = ""
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, cwd=folder, env=environment, input=said, capture_output=True, text=True, timeout=SECONDS, check=False
    )
