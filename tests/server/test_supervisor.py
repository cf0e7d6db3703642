"""The supervisor's laws, with children that speak its protocol and hold no engine (fake_child.py)."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_child.py")
PATIENCE = 30.0  # seconds that anything may take on a busy machine

READY: dict[str, Any] = {"do": [{"say": {"event": "ready", "model": "tiny"}}]}
CORE_DIES: dict[str, Any] = {"do": [*READY["do"], {"sleep": 0.1}, {"signal": signal.SIGKILL}]}

# argv: {"folder", "settings", "policy"}
RUNNER = """
import json, sys
from pathlib import Path
from jaxserve.config import EngineConfig
from server.observability.logs import configure_logging
from server.settings import ServeConfig, ServerSettings
from server.supervision.ports import reserve
from server.supervisor import Commands, RestartPolicy, supervise

given = json.loads(sys.argv[1])
policy = RestartPolicy(**{k: tuple(v) if isinstance(v, list) else v for k, v in given["policy"].items()})
child = (sys.executable, "-S", "-E", given["fake"])
commands = Commands(core=(*child, "core", given["folder"]), frontend=(*child, "frontend", given["folder"]))
config = ServeConfig(server=ServerSettings(**given["settings"]), engine=EngineConfig())
configure_logging(config.server, "supervisor")
with reserve(config.server) as ports:
    outcome = supervise(config, ports, commands=commands, policy=policy)
print(json.dumps([outcome.exit_code, outcome.error]))
sys.exit(outcome.exit_code)
"""


class Run:
    """One supervisor and what its children noted."""

    def __init__(self, folder: Path, settings: dict[str, Any], policy: dict[str, Any]):
        self.folder = folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        settings = {"port": 0, "grpc_port": 0, "admin_port": 0, **settings}
        policy = {"backoff": [0, 0, 0], "tick": 0.05, "drain_overrun": 5.0, **policy}
        given = {"folder": str(folder), "fake": str(FAKE), "settings": settings, "policy": policy}
        self.stderr = folder / "stderr"
        environment = {**os.environ, "TMPDIR": str(self.temporary), "JAXSERVE_API_KEY": "from-the-environment"}
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUNNER, json.dumps(given)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Waits for it to be true, and returns it."""
        end = time.monotonic() + PATIENCE
        while not (value := condition()):
            assert time.monotonic() < end, f"never: {what}\n{self.stderr.read_text()}"
            time.sleep(0.01)
        return value

    def note(self, name: str) -> Any:
        """What a child wrote to FOLDER/name, as soon as it has: "core.0.first", "frontend0.1.said"."""
        path = self.folder / name
        self.until(path.exists, name)
        return json.loads(path.read_text())

    def heard(self, name: str, count: int) -> list[dict[str, Any]]:
        """The first `count` commands that a life was given: heard("frontend0.0", 2)."""

        def said() -> list[dict[str, Any]]:
            path = self.folder / f"{name}.said"
            return json.loads(path.read_text()) if path.exists() else []

        self.until(lambda: len(said()) >= count, f"{count} commands to {name}")
        return said()[:count]

    def banner(self) -> str:
        self.until(lambda: "Ctrl-C" in self.stderr.read_text(), "the lines to try")
        return self.stderr.read_text()

    def pids(self) -> list[int]:
        return [json.loads(path.read_text())["pid"] for path in self.folder.glob("*.first")]

    def outcome(self) -> tuple[int, str | None]:
        """(exit code, error) of the supervisor, when it has ended."""
        out, _ = self.process.communicate(timeout=PATIENCE)
        code, error = json.loads(out)
        assert code == self.process.returncode
        return code, error


def gone(pid: int) -> bool:
    """Ended; a zombie counts, for here nobody may reap what lost its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """start(core=[lives], frontend=[lives], settings={}, **policy) -> Run"""
    runs: list[Run] = []

    def start(
        *,
        core: Sequence[Any] = (READY,),
        frontend: Sequence[Any] = (READY,),
        settings: dict[str, Any] | None = None,
        **policy: Any,
    ) -> Run:
        (tmp_path / "core.json").write_text(json.dumps(core))
        (tmp_path / "frontend.json").write_text(json.dumps(frontend))
        runs.append(Run(tmp_path, settings or {}, policy))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.communicate()
        try:
            run.until(lambda run=run: all(gone(pid) for pid in run.pids()), "the end of every child")
        finally:
            for pid in run.pids():
                if not gone(pid):
                    os.kill(pid, signal.SIGKILL)


def test_children_learn_settings_addresses_and_ports_from_their_first_line(start: Any) -> None:
    run = start(settings={"frontends": 2, "api_key": ["secret-key"], "drain_timeout": 7.0})
    core = run.note("core.0.first")["line"]
    for index in range(2):
        line = run.note(f"frontend{index}.0.first")["line"]
        assert line["index"] == index
        assert line["settings"]["api_key"] == ["secret-key"]
        assert line["settings"]["drain_timeout"] == 7.0
        assert line["engine"]["page_size"] == 16
        assert line["engine_address"] == core["engine_address"]
        assert len(set(line["ports"].values()) - {0}) == 3
    assert core["engine_address"].startswith(f"unix:{run.temporary}/")
    assert core["settings"]["api_key"] == []


def test_no_secret_is_in_a_childs_environment_or_arguments(start: Any) -> None:
    run = start(settings={"api_key": ["secret-key"]})
    for name in ("core.0", "frontend0.0"):
        first = run.note(f"{name}.first")
        assert not [variable for variable in first["env"] if variable.startswith("JAXSERVE_")]
        assert "secret-key" not in Path(f"/proc/{first['pid']}/cmdline").read_text()


def test_grpc_knows_the_experiments_that_children_turn_off(start: Any) -> None:
    run = start()
    for name in ("core.0", "frontend0.0"):
        turned_off = {"GRPC_EXPERIMENTS": run.note(f"{name}.first")["env"]["GRPC_EXPERIMENTS"]}
        command = [sys.executable, "-c", "import grpc; grpc.insecure_channel('unix:/nowhere').close()"]
        done = subprocess.run(command, env=os.environ | turned_off, capture_output=True, text=True, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, "")


def test_only_several_front_ends_share_their_metrics_through_a_folder(start: Any) -> None:
    run = start(settings={"frontends": 2})
    folders = {run.note(f"frontend{index}.0.first")["env"]["PROMETHEUS_MULTIPROC_DIR"] for index in range(2)}
    assert len(folders) == 1 and Path(folders.pop()).is_dir()
    assert "PROMETHEUS_MULTIPROC_DIR" not in run.note("core.0.first")["env"]


def test_the_runtime_folder_is_private_and_gone_at_the_end(start: Any) -> None:
    run = start()
    run.banner()
    folder = Path(run.note("core.0.first")["line"]["engine_address"].removeprefix("unix:")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    run.process.send_signal(signal.SIGTERM)
    assert run.outcome() == (0, None)
    assert list(run.temporary.iterdir()) == []


def test_lines_to_try_come_once_and_when_everybody_is_ready(start: Any) -> None:
    late = {"do": [{"sleep": 0.3}, *READY["do"]]}
    run = start(frontend=[late, CORE_DIES, READY], settings={"frontends": 2})
    assert "is ready: REST on" not in run.stderr.read_text()
    run.banner()
    os.kill(run.note("frontend0.0.first")["pid"], signal.SIGKILL)
    run.note("frontend0.2.first")
    assert run.stderr.read_text().count("curl -N http://127.0.0.1:") == 1


def test_a_dead_core_is_restarted_and_front_ends_live_on_and_are_told(start: Any) -> None:
    run = start()
    run.banner()
    os.kill(run.note("core.0.first")["pid"], signal.SIGKILL)
    assert run.note("core.1.first")["line"] == run.note("core.0.first")["line"] | {"restarts": 1}
    [told] = run.heard("frontend0.0", 1)
    assert (told["command"], told["phase"]) == ("engine", "restarting")
    assert "SIGKILL" in told["detail"] and "1 of 3" in told["detail"]
    assert not (run.folder / "frontend0.1.first").exists()
    assert not gone(run.note("frontend0.0.first")["pid"])


def test_restarts_wait_for_the_backoff(start: Any) -> None:
    run = start(core=[CORE_DIES, CORE_DIES, CORE_DIES, READY], backoff=[0, 0.2, 0.5])
    starts = [run.note(f"core.{life}.first")["start"] for life in range(4)]
    assert starts[2] - starts[1] >= 0.2
    assert starts[3] - starts[2] >= 0.5


def test_after_three_failed_restarts_front_ends_hear_that_it_is_dead_and_the_exit_code_is_1(start: Any) -> None:
    run = start(core=[CORE_DIES])
    code, error = run.outcome()
    assert code == 1
    assert error is not None and "engine core was killed by SIGKILL" in error and "3 restarts" in error
    phases = [command.get("phase", "drain") for command in run.heard("frontend0.0", 5)]
    assert phases == ["restarting", "restarting", "restarting", "dead", "drain"]
    assert len(list(run.folder.glob("core.*.first"))) == 4


def test_a_restart_that_never_gets_ready_counts_as_failed(start: Any) -> None:
    bad = {"do": [{"say": {"event": "failed", "message": "the model is gone"}}, {"exit": 2}]}
    code, error = start(core=[CORE_DIES, bad]).outcome()
    assert code == 1
    assert error is not None and "the model is gone" in error


def test_a_core_that_was_ready_for_long_starts_its_count_anew(start: Any) -> None:
    run = start(core=[CORE_DIES] * 6 + [READY], reset_after=0.05)
    run.note("core.6.first")
    run.process.send_signal(signal.SIGTERM)
    assert run.outcome() == (0, None)


def test_a_core_is_killed_and_restarted_when_it_falls_silent_and_not_before(start: Any) -> None:
    hung = {"do": [*READY["do"], {"sleep": 2.5}, {"signal": signal.SIGSTOP}]}
    run = start(core=[hung, READY], core_timeout=2.0)
    first, second = run.note("core.0.first"), run.note("core.1.first")
    assert second["start"] - first["start"] >= 4.0  # it beat for longer than the limit, and was silent for as long
    assert gone(first["pid"])
    assert "no sign of life for 2" in run.heard("frontend0.0", 1)[0]["detail"]


def test_a_supervisor_that_was_suspended_does_not_take_its_own_sleep_for_the_cores_silence(start: Any) -> None:
    run = start(core_timeout=2.0)
    run.banner()
    run.process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    run.process.send_signal(signal.SIGCONT)
    os.kill(run.note("frontend0.0.first")["pid"], signal.SIGKILL)
    run.note("frontend0.1.first")  # it is awake
    assert not (run.folder / "core.1.first").exists()
    assert not gone(run.note("core.0.first")["pid"])


def test_what_a_dead_core_had_started_dies_with_it(start: Any) -> None:
    leaves = {"do": [{"grandchild": True}, *READY["do"], {"sleep": 0.1}, {"exit": 3}]}
    run = start(core=[leaves, READY])
    run.note("core.1.first")  # although the first one's stdout was held open
    assert "exited with code 3" in run.heard("frontend0.0", 1)[0]["detail"]


def test_a_dead_front_end_is_restarted_alone(start: Any) -> None:
    run = start(settings={"frontends": 2})
    run.banner()
    os.kill(run.note("frontend1.0.first")["pid"], signal.SIGKILL)
    run.note("frontend1.1.first")
    assert not gone(run.note("core.0.first")["pid"])
    assert not gone(run.note("frontend0.0.first")["pid"])


def test_a_front_end_that_dies_again_and_again_ends_the_server(start: Any) -> None:
    code, error = start(frontend=[CORE_DIES]).outcome()
    assert code == 1
    assert error is not None and "front end 0" in error


@pytest.mark.parametrize("role", ["core", "frontend"])
def test_what_a_child_refuses_at_its_first_start_ends_all_with_its_message_and_exit_code_2(
    start: Any, role: str
) -> None:
    bad = {"do": [{"say": {"event": "failed", "message": "model='x' is no model"}}, {"exit": 2}]}
    run = start(**{role: [bad]})
    assert run.outcome() == (2, "model='x' is no model")
    assert len(list(run.folder.glob(f"{role}*.first"))) == 1


def test_a_child_that_dies_before_it_was_ever_ready_is_not_tried_again(start: Any) -> None:
    run = start(core=[{"do": [{"signal": signal.SIGSEGV}]}])
    assert run.outcome() == (1, "the engine core was killed by SIGSEGV before it was ready")
    assert len(list(run.folder.glob("core.*.first"))) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_front_ends_then_ends_the_core_with_exit_code_0(start: Any, number: signal.Signals) -> None:
    run = start(frontend=[READY | {"drain": {"after": "go"}}])
    run.banner()
    run.process.send_signal(number)
    assert run.heard("frontend0.0", 1) == [{"command": "drain"}]
    assert not gone(run.note("core.0.first")["pid"])
    assert not (run.folder / "core.0.eof").exists()
    (run.folder / "go").touch()
    assert run.outcome() == (0, None)
    assert run.note("core.0.eof") is True


def test_a_signal_while_the_model_loads_ends_all_with_exit_code_0(start: Any) -> None:
    run = start(core=[{"do": []}], frontend=[{"do": []}])
    run.note("core.0.first"), run.note("frontend0.0.first")
    run.process.send_signal(signal.SIGTERM)
    assert run.outcome() == (0, None)


def test_a_core_that_dies_during_the_drain_is_restarted_for_the_streams_that_still_run(start: Any) -> None:
    run = start(frontend=[READY | {"drain": {"after": "go"}}])
    run.banner()
    run.process.send_signal(signal.SIGTERM)
    run.heard("frontend0.0", 1)
    os.kill(run.note("core.0.first")["pid"], signal.SIGKILL)
    run.note("core.1.first")
    (run.folder / "go").touch()
    assert run.outcome() == (0, None)


def test_a_front_end_that_dies_during_the_drain_is_not_restarted(start: Any) -> None:
    run = start(frontend=[READY | {"drain": {"ignore": True}}])
    run.banner()
    run.process.send_signal(signal.SIGTERM)
    run.heard("frontend0.0", 1)
    os.kill(run.note("frontend0.0.first")["pid"], signal.SIGKILL)
    assert run.outcome() == (0, None)
    assert len(list(run.folder.glob("frontend0.*.first"))) == 1


def test_a_front_end_that_overruns_the_drain_timeout_is_killed(start: Any) -> None:
    run = start(frontend=[READY | {"drain": {"ignore": True}}], settings={"drain_timeout": 0.1}, drain_overrun=0.5)
    run.banner()
    run.process.send_signal(signal.SIGTERM)
    assert run.outcome() == (0, None)
    assert all(gone(pid) for pid in run.pids())


def test_a_second_signal_ends_everything_at_once_with_exit_code_0(start: Any) -> None:
    run = start(frontend=[READY | {"drain": {"ignore": True}}], settings={"drain_timeout": 600})
    run.banner()
    run.process.send_signal(signal.SIGTERM)
    run.heard("frontend0.0", 1)
    run.process.send_signal(signal.SIGTERM)
    assert run.outcome() == (0, None)
    run.until(lambda: all(gone(pid) for pid in run.pids()), "the end of every child")
    assert not (run.folder / "frontend0.0.eof").exists()  # it was killed


def test_a_front_end_may_ask_for_the_drain(start: Any) -> None:
    run = start(frontend=[{"do": [*READY["do"], {"say": {"event": "drain"}}, {"exit": 0}]}])
    assert run.outcome() == (0, None)
    assert len(list(run.folder.glob("frontend0.*.first"))) == 1


def test_no_child_outlives_a_killed_supervisor(start: Any) -> None:
    run = start(settings={"frontends": 2})
    run.banner()
    run.process.kill()
    run.process.wait()
    run.until(lambda: all(gone(pid) for pid in run.pids()), "the end of every child")
    assert run.note("core.0.eof") and run.note("frontend0.0.eof") and run.note("frontend1.0.eof")


def test_what_a_library_prints_on_a_childs_stdout_goes_to_stderr(start: Any) -> None:
    run = start(core=[{"do": [{"print": "hello from a library"}, {"print": "[1, 2]"}, *READY["do"]]}])
    assert "hello from a library\n[1, 2]\n" in run.banner()


def test_the_supervisor_loads_neither_jax_nor_a_web_framework() -> None:
    script = (
        "import sys, server.supervisor\n"
        "sys.exit(' '.join({'jax', 'flax', 'fastapi', 'starlette', 'uvicorn', 'grpc', 'transformers'}"
        " & set(sys.modules)) or None)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
