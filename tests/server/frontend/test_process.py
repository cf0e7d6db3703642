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


def test_front_end_is_ready_when_text_is_and_one_that_never_can_be_ends_with_the_reason(
    start_core: Callable[..., Any], start: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    core = start_core()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    (broken / "config.json").write_text((tiny_model / "config.json").read_text())
    good = start(core.address)
    no_template = start(core.address, chat_template=str(tmp_path / "missing.jinja"))
    no_tokenizer = start(core.address, tokenizer=str(broken))
    assert said(good) == {"event": "ready", "model": "tiny_model0"}
    for process, named in ((no_template, "missing.jinja"), (no_tokenizer, "tokenizer.json")):
        event = said(process)
        assert event["event"] == "failed" and named in event["message"] and "\n" not in event["message"]
        assert process.wait(30) == 2
    tell(good, {"command": "drain"})
    assert good.wait(30) == 0


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
