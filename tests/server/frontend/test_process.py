"""A front end's process: says when it is ready, ends when it never can be, leaves when it is told or orphaned."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.config import EngineConfig
from server.settings import ServeConfig, ServerSettings

SETTINGS = ServerSettings(port=0, grpc_port=0, admin_port=0, drain_timeout=5)


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """start(address, **options): a front end of the core at that address."""
    started: list[subprocess.Popen[str]] = []

    def begin(address: str, **options: Any) -> "subprocess.Popen[str]":
        engine = EngineConfig.from_options(**{"model": str(tiny_model), "show_progress": False, **options})
        hello = ServeConfig(server=SETTINGS, engine=engine).to_json()
        hello |= {"engine_address": address, "ports": {"rest": 0, "grpc": 0, "admin": 0}, "index": 0}
        process = subprocess.Popen(
            [sys.executable, "-m", "server.frontend"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        tell(process, hello)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def tell(process: "subprocess.Popen[str]", message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def said(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def test_front_end_says_when_it_is_ready_and_drains(start_core: Callable[..., Any], start: Callable[..., Any]) -> None:
    process = start(start_core().address)
    assert said(process)["event"] == "ready"
    tell(process, {"command": "drain"})
    assert process.wait(30) == 0


@pytest.mark.parametrize(("option", "named"), [("chat_template", "missing.jinja"), ("tokenizer", "tokenizer.json")])
def test_front_end_that_cannot_make_text_ends_with_the_reason_before_there_is_an_engine(
    start: Callable[..., Any], tiny_model: Path, tmp_path: Path, option: str, named: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    (broken / "config.json").write_text((tiny_model / "config.json").read_text())
    value = {"chat_template": broken / "missing.jinja", "tokenizer": broken}[option]
    process = start(f"unix:{tmp_path}/nobody.sock", **{option: str(value)})
    event = said(process)
    assert event["event"] == "failed" and named in event["message"] and "\n" not in event["message"]
    assert process.wait(30) == 2


@pytest.mark.parametrize("phase", ["restarting", "dead"])
def test_front_end_without_a_core_leaves_when_it_is_told_to(
    start: Callable[..., Any], tmp_path: Path, phase: str
) -> None:
    process = start(f"unix:{tmp_path}/nobody.sock")
    tell(process, {"command": "engine", "phase": phase, "detail": "killed"})
    tell(process, {"command": "drain"})
    assert process.wait(60) == 0


def test_front_end_without_a_supervisor_leaves(start: Callable[..., Any], tmp_path: Path) -> None:
    process = start(f"unix:{tmp_path}/nobody.sock")
    process.stdin.close()
    assert process.wait(60) == 0
