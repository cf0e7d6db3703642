"""Every setting has a flag, and only flags that were given reach the engine."""

import dataclasses
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from jaxserve.config import CacheOptions, CompileOptions, KernelOptions, ModelOptions, SchedulerOptions
from jaxserve.errors import ConfigError, JaxserveError
from server.commands.flags import ENGINE_HELP, command

SEEN: dict[str, Any] = {}


@command
def probe(engine: dict[str, Any], sampling: dict[str, Any]) -> None:
    SEEN.update(engine=engine, sampling=sampling)
    if engine.get("model") == "missing":
        raise ConfigError("model='missing'\nis not there")


app = typer.Typer(pretty_exceptions_enable=False)
app.command()(probe)


def run(*arguments: str) -> Any:
    SEEN.clear()
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("section", [ModelOptions, CacheOptions, SchedulerOptions, KernelOptions, CompileOptions])
def test_every_engine_setting_has_a_flag(section: type) -> None:
    assert set(ENGINE_HELP[section]) == {field.name for field in dataclasses.fields(section)}


def test_flags_that_were_not_given_are_not_passed() -> None:
    assert run().exit_code == 0
    assert SEEN == {"engine": {}, "sampling": {}}


def test_given_flags_arrive_under_their_names_with_their_types() -> None:
    result = run(
        *("--model", "m", "--page-size", "32", "--memory-utilization", "0.5", "--no-enable-prefix-caching"),
        *("--overlap", "0", "--temperature", "0", "--seed", "7", "--stop", "a", "--stop", "b", "--ignore-eos"),
    )
    assert result.exit_code == 0, result.output
    assert SEEN["engine"] == {
        "model": "m",
        "page_size": 32,
        "memory_utilization": 0.5,
        "enable_prefix_caching": False,
        "overlap": 0,
    }
    assert SEEN["sampling"] == {"temperature": 0.0, "seed": 7, "stop": ["a", "b"], "ignore_eos": True}


def test_our_error_is_one_line_and_exit_code_2() -> None:
    result = run("--model", "missing")
    assert result.exit_code == 2
    assert result.stderr == "error: model='missing' is not there\n"
    assert result.stdout == ""


def test_debug_lets_the_traceback_through() -> None:
    result = run("--model", "missing", "--debug")
    assert isinstance(result.exception, JaxserveError)


def test_unknown_flag_is_refused_with_usage() -> None:
    result = run("--max-model-length", "8")
    assert result.exit_code == 2
    assert "--max-model-len" in result.output
