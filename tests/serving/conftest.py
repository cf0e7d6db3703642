"""A `jaxserve serve` process with the default model, as users start it.

Everything here goes through sockets, signals and the log; nothing of the server is imported.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("jaxserve")
# Few steps to compile, so that a test can have a server of its own.
SMALL = ("--max-num-seqs=8", "--max-num-batched-tokens=64", "--max-model-len=1024", "--num-pages=520")
KEY = "the-key-of-the-tests"
START_TIMEOUT = 900.0  # seconds; the first start on a machine compiles
LOG_TAIL = 25  # lines shown where a test fails
IDLE_GAUGES = ("open_requests", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
HOSTILE_TEMPLATE = """{% for message in messages -%}
  {% if message.content == "loop" -%}
    {% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
  {%- elif message.content == "bomb" -%} {{ "a" * 10 ** 10 }}
  {%- elif message.content == "flood" -%} {% for i in range(99999) %}{{ "a" * 99999 }}{% endfor %}
  {%- else -%} {{ message.content }}
  {%- endif %}
{%- endfor %}"""


class Server:
    """One run of `jaxserve serve`. rest, grpc, admin: where it listens, known once it is ready."""

    def __init__(self, flags: tuple[str, ...], log: Path, fixed_ports: bool = False):
        self.log = log
        ports = free_ports() if fixed_ports else (0, 0, 0)
        names = ("--port", "--grpc-port", "--admin-port")
        command = [str(COMMAND), "serve", "--log-format=json", *flags]
        command += [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAXSERVE_")}
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        self._at(*ports)
        self.model = ""
        self.key = next((flag.partition("=")[2] for flag in flags if flag.startswith("--api-key=")), "")
        self.headers = {"authorization": f"Bearer {self.key}"} if self.key else {}

    def _at(self, rest: int, grpc: int, admin: int) -> None:
        self.port, self.grpc_port, self.admin_port = rest, grpc, admin
        self.rest, self.admin = f"http://127.0.0.1:{rest}", f"http://127.0.0.1:{admin}"
        self.grpc = f"127.0.0.1:{grpc}"

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not (ready := [record for record in self.records() if "grpc" in record]):
            assert self.process.poll() is None, f"it ended with code {self.process.returncode}\n{self.log_tail()}"
            assert time.monotonic() < deadline, f"it never got ready\n{self.log_tail()}"
            time.sleep(0.1)
        self._at(ready[0]["rest"], ready[0]["grpc"], ready[0]["admin"])
        self.model = ready[0]["model"]
        assert httpx.get(f"{self.rest}/health/ready").status_code == 200

    # What it says

    def records(self, since: int = 0) -> list[dict[str, Any]]:
        """Its log from a position on; what is no JSON (tables and progress for people) is left out."""
        text = self.log.read_bytes()[since:].decode(errors="replace")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def log_size(self) -> int:
        return self.log.stat().st_size

    def log_tail(self) -> str:
        """The last of it, for people: messages and tracebacks, without the lines of single requests."""
        lines = []
        for line in self.log.read_text(errors="replace").splitlines():
            if line.startswith("{"):
                record = json.loads(line)
                line = f"{record['time'][11:23]} {record['process']} {record['message']}\n{record.get('exception', '')}"
                line = line.rstrip() if "request_id" not in record else ""
            lines += [line] if line else []
        return "\n".join(lines[-LOG_TAIL:])

    def failures(self, since: int = 0) -> list[dict[str, Any]]:
        """What it logged as an error, or with a traceback."""
        return [r for r in self.records(since) if "exception" in r or r["level"] in ("error", "critical")]

    def metric(self, name: str, **labels: str) -> float:
        """The sum over the series that have these labels."""
        text = httpx.get(f"{self.admin}/metrics").text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        fitting = [s for s in samples if s.name == f"jaxserve:{name}" and labels.items() <= s.labels.items()]
        assert fitting, f"/metrics has no {name} {labels}"
        return sum(sample.value for sample in fitting)

    def health(self, path: str = "/health/ready") -> httpx.Response:
        return httpx.get(self.rest + path, timeout=30)

    def status(self) -> dict[str, Any]:
        """What the front end knows, with every count of the engine."""
        return httpx.get(f"{self.admin}/admin/status", headers=self.headers).json()

    def until(self, condition: Callable[[], Any], what: str, timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"it never came true that {what}"
            time.sleep(0.02)

    def assert_idle(self, timeout: float = 60.0) -> None:
        """Waits until nothing is left of any request, neither sample nor page."""
        deadline = time.monotonic() + timeout
        while any((gauges := {name: self.metric(name) for name in IDLE_GAUGES}).values()):
            assert time.monotonic() < deadline, f"something is left: {gauges}"
            time.sleep(0.05)

    # What is asked of it

    def post(
        self, route: str, body: Any, headers: dict[str, str] | None = None, timeout: float = 300
    ) -> httpx.Response:
        return httpx.post(self.rest + route, json=body, headers=self.headers | (headers or {}), timeout=timeout)

    def events(
        self, route: str, body: dict[str, Any], headers: dict[str, str] | None = None, timeout: float = 300
    ) -> Iterator[dict[str, Any]]:
        """The objects of an event stream, errors in it included. Closing the generator drops the connection."""
        with (
            httpx.Client(headers=self.headers, timeout=timeout) as client,
            client.stream("POST", self.rest + route, json={**body, "stream": True}, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                answer.read()
                raise AssertionError(f"{answer.status_code}: {answer.text}")
            done = False
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))
            assert done, "the stream ended without [DONE]"

    def streamed(self, route: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        """A streamed answer put together: `choices` by index, `usage`, and `error` where it ended with one."""
        answer: dict[str, Any] = {"choices": {}, "usage": None, "error": None}
        for event in self.events(route, body, headers):
            answer["error"] = event.get("error") or answer["error"]
            answer["usage"] = event.get("usage") or answer["usage"]
            for choice in event.get("choices", ()):
                self.add_choice(answer["choices"], choice)
        return answer

    @staticmethod
    def add_choice(choices: dict[int, dict[str, Any]], part: dict[str, Any]) -> None:
        """One choice of a chunk to those before it, of a chat or a completion."""
        blank = {"text": "", "token_ids": [], "logprobs": [], "finish_reason": None, "stop_reason": None}
        choice = choices.setdefault(part["index"], blank)
        assert choice["finish_reason"] is None, "nothing comes after the last chunk of a choice"
        choice["text"] += part["delta"].get("content") or "" if "delta" in part else part["text"]
        choice["token_ids"] += part.get("token_ids") or []
        if (logprobs := part.get("logprobs")) is not None:
            chat = logprobs.get("content")
            choice["logprobs"] += logprobs["token_logprobs"] if chat is None else [entry["logprob"] for entry in chat]
        choice["finish_reason"] = part["finish_reason"]
        choice["stop_reason"] = part.get("stop_reason")

    # What is done to it

    @property
    def core(self) -> psutil.Process:
        return self._children("server.core")[0]

    @property
    def frontends(self) -> list[psutil.Process]:
        return self._children("server.frontend")

    def _children(self, module: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            try:
                if module in child.cmdline():
                    found.append(child)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 60.0) -> int:
        """Its exit code."""
        return self.process.wait(timeout)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.terminate()
        return self.wait()

    def kill(self) -> None:
        """Whatever state it is in; its children notice and go."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def small_flags() -> tuple[str, ...]:
    return SMALL


_running: list[Server] = []


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """launch(*flags): a server that is ready. fixed_ports=True: one that starts, its addresses known already."""
    folder = tmp_path_factory.mktemp("servers")

    def start(*flags: str, fixed_ports: bool = False) -> Server:
        server = Server(flags, folder / f"{len(list(folder.iterdir()))}.log", fixed_ports)
        _running.append(server)
        if not fixed_ports:
            server.wait_ready()
        return server

    yield start
    for server in _running:
        server.kill()


def finished(server: Server) -> None:
    """The end of a server whose tests are done: as an operator ends it, and with nothing left."""
    try:
        if server.process.poll() is None:
            server.terminate()
            code = server.wait()
            assert code == 0, f"it ended with code {code}"
    finally:
        server.kill()
        _running.remove(server)


@pytest.fixture(scope="session")
def server(launch: Callable[..., Server]) -> Iterator[Server]:
    """The default model with default settings, for all tests that leave it as they found it."""
    shared = launch()
    yield shared
    shared.assert_idle()
    finished(shared)


@pytest.fixture(scope="session")
def keyed(launch: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A small server that asks for `keyed.key`, drops slow readers soon, and lets two samples wait.

    Its chat template is one that a message can make loop or grow.
    """
    template = tmp_path_factory.mktemp("template") / "hostile.jinja"
    template.write_text(HOSTILE_TEMPLATE)
    shared = launch(
        *SMALL,
        f"--api-key={KEY}",
        f"--chat-template={template}",
        "--unknown-params=warn",
        "--slow-reader-timeout=2",
        "--max-num-queued-reqs=2",
    )
    yield shared
    shared.assert_idle()
    finished(shared)


@pytest.fixture
def start_server(launch: Callable[..., Server]) -> Iterator[Callable[..., Server]]:
    """start_server(*flags): a small server for this test alone. One still running in the end must stop cleanly.

    Later flags come before earlier ones, so flags may say that it is to be of another size.
    """
    started: list[Server] = []

    def start(*flags: str, fixed_ports: bool = False) -> Server:
        started.append(launch(*SMALL, *flags, fixed_ports=fixed_ports))
        return started[-1]

    yield start
    for server in started:
        finished(server)


def free_ports() -> tuple[int, ...]:
    """Three that nobody has at this moment."""
    sockets = [socket.socket() for _ in range(3)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = tuple(sock.getsockname()[1] for sock in sockets)
    for sock in sockets:
        sock.close()
    return ports


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A failed test shows what the servers logged."""
    report = yield
    if report.failed:
        report.sections += [(f"log of {' '.join(server.process.args)}", server.log_tail()) for server in _running]
    return report
