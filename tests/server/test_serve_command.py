"""`jaxserve serve`: flags for every setting, --dry-run, exit codes; what runs below it is stood in for."""

import dataclasses
import importlib
import os
import re
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jaxserve.config import CacheOptions, CompileOptions, ModelOptions, SchedulerOptions
from jaxserve.errors import ModelNotFoundError
from server import supervisor
from server.cli import app
from server.commands.server_flags import SERVER_DEFAULTS, SERVER_HELP
from server.settings import ALIASES, ServeConfig, ServerSettings
from server.supervision.ports import Ports
from server.supervisor import Outcome

ROOT = Path(__file__).parents[2]
ANSI = re.compile(r"\x1b\[[0-9;]*m")
ANY_PORTS = ("--port", "0", "--grpc-port", "0", "--admin-port", "0")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings from outside, and the log handlers of the tests stay as they are."""
    for name in os.environ:
        if name.startswith("JAXSERVE_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("server.observability.logs.configure_logging", lambda *_: None)


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServeConfig, Ports]]:
    """What the supervisor was called with; it ends at once, as if by a signal."""
    calls: list[tuple[ServeConfig, Ports]] = []

    def supervise(config: ServeConfig, ports: Ports) -> Outcome:
        calls.append((config, ports))
        return Outcome(0)

    monkeypatch.setattr(supervisor, "supervise", supervise)
    return calls


def serve(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["serve", *arguments])


def plain(text: str) -> str:
    return ANSI.sub("", text)


# Flags


def test_every_server_setting_has_a_help_text_in_one_panel() -> None:
    named = [name for texts in SERVER_HELP.values() for name in texts]
    assert sorted(named) == sorted(ServerSettings.model_fields)
    assert set(SERVER_DEFAULTS) <= set(named)


def test_help_lists_every_setting_and_alias_by_panel_with_its_default() -> None:
    result = serve("--help")
    assert result.exit_code == 0
    text = plain(result.output)
    sections = (ModelOptions, CacheOptions, SchedulerOptions, CompileOptions)
    engine = [field.name for section in sections for field in dataclasses.fields(section)]
    for name in {*ServerSettings.model_fields, *engine, *ALIASES, "seed", "config", "dry_run"} - {"model"}:
        assert re.search(rf"--{name.replace('_', '-')}\b", text), name
    for panel in (*SERVER_HELP, "Model", "KV pool", "Scheduling", "Compilation"):
        assert f"─ {panel} ─" in text
    assert "50051" in text and "256 on GPU, 32 on CPU" in text
    assert "[MODEL]" in text


def test_help_of_serve_loads_no_jax_and_no_web_framework() -> None:
    script = (
        "import sys\n"
        "from server.cli import app\n"
        "try:\n    app(['serve', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "sys.exit(' '.join({'jax', 'transformers', 'fastapi', 'uvicorn', 'grpc', 'pydantic_settings', 'numpy'}"
        " & set(sys.modules)) or None)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_flags_of_both_halves_arrive_where_they_belong(supervised: list[tuple[ServeConfig, Ports]]) -> None:
    result = serve(
        *("some/model", *ANY_PORTS, "--host", "127.0.0.1", "--api-key", "a", "--api-key", "b,c", "--frontends", "2"),
        *("--served-model-name", "x", "--no-playground", "--default-timeout", "1.5", "--unknown-params", "warn"),
        *("--page-size", "32", "--no-enable-prefix-caching", "--seed", "7", "--scheduling-policy", "priority"),
    )
    assert result.exit_code == 0, result.output
    [(config, ports)] = supervised
    server, engine = config.server, config.engine
    assert (server.api_key, server.frontends, server.served_model_name) == (("a", "b", "c"), 2, ("x",))
    assert (server.playground, server.default_timeout, server.unknown_params) == (False, 1.5, "warn")
    assert (engine.model.model, engine.cache.page_size, engine.cache.enable_prefix_caching) == ("some/model", 32, False)
    assert (engine.seed, engine.scheduler.scheduling_policy) == (7, "priority")
    assert 0 not in ports.to_json().values()


@pytest.mark.parametrize(
    ("flag", "text", "read"),
    [
        ("--block-size", "32", lambda config: config.engine.cache.page_size == 32),
        ("--gpu-memory-utilization", "0.5", lambda config: config.engine.cache.memory_utilization == 0.5),
        ("--shutdown-timeout", "3", lambda config: config.server.drain_timeout == 3),
        ("--api-server-count", "3", lambda config: config.server.frontends == 3),
        ("--uvicorn-log-level", "debug", lambda config: config.server.log_level == "debug"),
    ],
)
def test_flags_that_users_of_vllm_know_mean_the_same(
    supervised: list[tuple[ServeConfig, Ports]], flag: str, text: str, read: Callable[[ServeConfig], bool]
) -> None:
    assert serve(*ANY_PORTS, flag, text).exit_code == 0
    [(config, _)] = supervised
    assert read(config)


def test_a_file_is_read_below_the_flags(supervised: list[tuple[ServeConfig, Ports]], tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("model: from/file\ndrain-timeout: 3\nfrontends: 2\n")
    assert serve("--config", str(path), *ANY_PORTS, "--frontends", "4").exit_code == 0
    [(config, _)] = supervised
    assert (config.engine.model.model, config.server.drain_timeout, config.server.frontends) == ("from/file", 3.0, 4)


# --dry-run


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engine configurations that were planned; the plan's table is a word."""
    build = types.ModuleType("jaxserve.engine.build")
    configs: list[Any] = []

    def plan_memory_for(config: Any) -> Any:
        configs.append(config)
        return types.SimpleNamespace(table=lambda: "the memory plan")

    build.plan_memory_for = plan_memory_for  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jaxserve.engine.build", build)
    return configs


def test_a_dry_run_shows_every_setting_with_its_origin_then_the_plan_and_starts_nothing(
    planned: list[Any], supervised: list[tuple[ServeConfig, Ports]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("max_num_seqs: 4\n")
    monkeypatch.setenv("JAXSERVE_API_KEY", "secret-key")
    monkeypatch.setenv("JAXSERVE_CONFIG", str(path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()  # a dry run may be asked for beside a server that runs
        port = taken.getsockname()[1]
        result = serve("some/model", "--dry-run", "--port", str(port))
    assert result.exit_code == 0, result.output
    rows = {
        cells[0]: cells[1:]
        for line in plain(result.stdout).splitlines()
        if line.startswith("│") and len(cells := [cell.strip() for cell in line.strip("│").split("│")]) == 3
    }
    assert rows["port"] == [str(port), "--port"]
    assert rows["model"] == ["some/model", "MODEL"]
    assert rows["api_key"] == ["***", "JAXSERVE_API_KEY"]
    assert rows["max_num_seqs"] == ["4", "serve.yaml"]
    assert rows["grpc_port"] == ["50051", "default"]
    assert rows["max_num_batched_tokens"] == ["8192 on GPU, 512 on CPU", "default"]
    assert set(ServerSettings.model_fields) <= set(rows)
    assert "secret-key" not in result.output
    assert result.stdout.rstrip().endswith("the memory plan")
    assert [config.scheduler.max_num_seqs for config in planned] == [4]
    assert supervised == []


# Refusals and exit codes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "99999"], "port=99999"),
        (["--page-size", "12"], "page_size=12"),
        (["--ssl-keyfile", "k.pem"], "ssl_keyfile='k.pem' needs ssl_certfile"),
        (["--in-process", "--frontends", "2"], "frontends=2"),
        (["--api-key", ""], "api_key"),
        (["--config", "/no/such/file.yaml"], "/no/such/file.yaml"),
        (["--host", "203.0.113.7"], "host='203.0.113.7'"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2_and_nothing_starts(
    supervised: list[tuple[ServeConfig, Ports]], arguments: list[str], named: str
) -> None:
    result = serve(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert named in result.stderr
    assert supervised == []


def test_a_port_in_use_is_one_line_naming_port_and_flag_and_exit_code_2(
    supervised: list[tuple[ServeConfig, Ports]],
) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = serve("--port", "0", "--admin-port", "0", "--grpc-port", str(port))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: grpc_port={port} on 127.0.0.1 is taken")
    assert "--grpc-port" in result.stderr and result.stderr.count("\n") == 1
    assert supervised == []


@pytest.mark.parametrize("outcome", [Outcome(2, "model='x'\nis no model"), Outcome(1, "the engine core died")])
def test_the_supervisors_outcome_is_the_exit_code_and_one_line(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    monkeypatch.setattr(supervisor, "supervise", lambda *_: outcome)
    result = serve(*ANY_PORTS)
    assert result.exit_code == outcome.exit_code
    assert result.stderr == f"error: {' '.join(str(outcome.error).split())}\n"


def test_in_process_serves_without_a_supervisor_and_announces_when_ready(
    monkeypatch: pytest.MonkeyPatch, supervised: list[tuple[ServeConfig, Ports]]
) -> None:
    process = types.ModuleType("server.frontend.process")

    def run_in_process(config: ServeConfig, ports: Ports, on_ready: Callable[[Any, Ports], None]) -> None:
        assert config.engine.model.model == "some/model"
        on_ready(types.SimpleNamespace(model_names=("tiny", "other")), ports)

    process.run_in_process = run_in_process  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server.frontend.process", process)
    result = serve("some/model", "--in-process", *ANY_PORTS)
    assert result.exit_code == 0, result.output
    assert "tiny is ready" in result.stderr
    assert supervised == []


def test_in_process_a_bad_model_is_one_line_and_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    process = types.ModuleType("server.frontend.process")

    def run_in_process(*_: Any) -> None:
        raise ModelNotFoundError("model='x' is not there")

    process.run_in_process = run_in_process  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server.frontend.process", process)
    result = serve("x", "--in-process", *ANY_PORTS)
    assert (result.exit_code, result.stderr) == (2, "error: model='x' is not there\n")


# python -m server


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], ["serve"]),
        (["--port", "9000"], ["serve", "--port", "9000"]),
        (["serve", "--port", "9000"], ["serve", "--port", "9000"]),
        (["plan", "m"], ["plan", "m"]),
        (["--version"], ["--version"]),
        (["--help"], ["--help"]),
    ],
)
def test_python_dash_m_server_serves_unless_told_otherwise(given: list[str], meant: list[str]) -> None:
    assert importlib.import_module("server.__main__").arguments(given) == meant
