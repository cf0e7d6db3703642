"""The command as a whole: help, version, refusals."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import jaxserve
from server.cli import app

ROOT = Path(__file__).parents[2]
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def plain(text: str) -> str:
    return ANSI.sub("", text)


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for name in ("generate", "chat", "plan", "doctor"):
        assert re.search(rf"\b{name}\b", plain(result.output))


@pytest.mark.parametrize("name", ["generate", "chat", "plan"])
def test_help_of_a_command_lists_the_engine_flags(name: str) -> None:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, [name, "--help"])
    assert result.exit_code == 0
    for flag in ("--max-model-len", "--max-num-seqs", "--dtype", "--page-size", "--debug"):
        assert flag in plain(result.output)


def test_help_loads_no_jax() -> None:
    script = (
        "import sys\n"
        "from server.cli import app\n"
        "try:\n    app(['generate', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "sys.exit(' '.join({'jax', 'transformers', 'tokenizers'} & set(sys.modules)) or None)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"jaxserve {jaxserve.__version__}\n")


def test_python_dash_m_server_is_the_command() -> None:
    command = [sys.executable, "-m", "server", "--version"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, f"jaxserve {jaxserve.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "hi", "--temperature", "9"], "temperature=9.0"),
        (["generate", "hi", "--model", "/no/such/model"], "/no/such/model"),
        (["generate", "hi", "--page-size", "12"], "page_size=12"),
        (["plan", "/no/such/model"], "/no/such/model"),
        (["plan", "--num-pages", "9", "--kv-cache-memory-bytes", "9"], "num_pages=9"),
        (["chat", "--model", "/no/such/model.gguf"], "/no/such/model.gguf"),
    ],
)
def test_refusal_is_one_line_naming_the_value(arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert named in result.stderr
    assert result.stdout == ""
