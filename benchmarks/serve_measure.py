"""A plan in, measurements out: what serve.py measures, a workload at a time, on the server and in the engine alone."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import serve_processes
import serve_prompts
from serve_processes import Addresses
from serve_prompts import Workload

from jaxserve.config import CacheOptions, CompileOptions, ModelOptions, SchedulerOptions

HERE = Path(__file__).resolve().parent
DEFAULT_MODEL = "SmolLM2-135M-Instruct"  # what a server that was given no model says it runs
ENGINE_OPTIONS = {
    option.name
    for section in (ModelOptions, CacheOptions, SchedulerOptions, CompileOptions)
    for option in dataclasses.fields(section)
}
ALONE = "in-process"  # the side that protocols are compared with
Job = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """addresses: of a server that runs; None = start one with `model` and `options` (setting -> value as in a flag)."""

    addresses: Addresses | None
    model: str | None
    options: Mapping[str, str]
    works: Sequence[Workload]
    protocols: Sequence[str]  # rest, grpc
    repeats: int
    alone: bool  # measure the engine without a server, too

    @property
    def sides(self) -> list[str]:
        return [*self.protocols, *([ALONE] if self.alone else [])]


@dataclass(kw_only=True)
class Measured:
    """One workload on one side, over its repeats: seconds, reports of streams, CPU seconds by role."""

    wall: list[float] = field(default_factory=list)
    streams: list[dict[str, Any]] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """status: what the server says of itself. memory_mib: by role, after the last workload."""

    status: dict[str, Any]
    memory_mib: dict[str, dict[str, float]]
    measured: dict[tuple[str, str], Measured]  # by (workload, protocol or ALONE)


def measure(plan: Plan) -> Outcome:
    """Every repeat has processes of its own: the memory one happens to get makes it some percent faster or slower."""
    measured = {(work.name, side): Measured() for work in plan.works for side in plan.sides}
    for repeat in range(plan.repeats):
        with ExitStack() as stack:
            status, memory = _measure_once(plan, measured, stack, backwards=repeat % 2 == 1)
    return Outcome(status=status, memory_mib=memory, measured=measured)


def _measure_once(
    plan: Plan, measured: Mapping[tuple[str, str], Measured], stack: ExitStack, *, backwards: bool
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Adds to `measured`. Returns status and memory of the server. backwards: who came first comes last."""
    server_life = stack.enter_context(ExitStack())
    server = Server(server_life.enter_context(_running(plan, stack)))
    jobs = _Jobs(server.tokens())
    together = server.status["info"]["platform"] == "cpu"
    order = [(side, work) for work in plan.works for side in (plan.sides[::-1] if backwards else plan.sides)]
    if not together:  # an accelerator holds one engine
        order.sort(key=lambda turn: turn[0] == ALONE)
    warm = serve_prompts.workload("w2", quick=True)
    for protocol in plan.protocols:
        server.run(jobs.make(warm), protocol)
    memory: dict[str, dict[str, float]] = {}
    engine: Callable[[Job], float] | None = None
    for side, work in order:
        taken = measured[work.name, side]
        if side != ALONE:
            server.run(jobs.make(work), side, taken)
            memory = server.memory()
        else:
            if engine is None:
                if not together:
                    server_life.close()
                engine = stack.enter_context(engine_alone(*_same_settings(plan, server.status)))
                engine(jobs.make(warm))
            taken.wall.append(engine(jobs.make(work)))
        print(f"{work.name} {side}: {taken.wall[-1]:.2f} s", flush=True)
    return server.status, memory


class Server:
    """One that runs."""

    def __init__(self, addresses: Addresses):
        self.addresses = addresses
        self.status = _call(f"{addresses.admin}/admin/status")
        self._roles = serve_processes.roles(urlsplit(addresses.rest).port or 80)

    def tokens(self) -> list[int]:
        """Of the text that all prompts are made of."""
        bodies = [{"prompt": part, "add_special_tokens": False} for part in serve_prompts.paragraphs()]
        return [token for body in bodies for token in _call(f"{self.addresses.rest}/tokenize", body)["tokens"]]

    def run(self, job: Job, protocol: str, taken: Measured | None = None) -> None:
        """Has the client do the job, and adds to `taken` what it saw and what the server's processes used."""
        rest = urlsplit(self.addresses.rest)
        host, port = str(rest.hostname), str(rest.port or 80)
        if protocol == "grpc":
            host, _, port = self.addresses.grpc.rpartition(":")
        where = {"protocol": protocol, "host": host, "port": int(port), "model": self.status["models"][0]}
        client = [sys.executable, str(HERE / "serve_client.py")]
        before = self._cpu()
        done = subprocess.run(client, input=json.dumps(job | where), stdout=subprocess.PIPE, text=True)
        after = self._cpu()
        if done.returncode:
            raise SystemExit(f"the client failed under {protocol}, see above")
        if taken is not None:
            report = json.loads(done.stdout)
            taken.wall.append(report["wall_s"])
            taken.streams += report["streams"]
            spent = {role: after[role] - before[role] for role in after} | {"client": report["client_cpu_s"]}
            taken.cpu = {role: taken.cpu.get(role, 0.0) + seconds for role, seconds in spent.items()}

    def memory(self) -> dict[str, dict[str, float]]:
        return {role: serve_processes.memory_mib(pids) for role, pids in self._roles.items()}

    def _cpu(self) -> dict[str, float]:
        return {role: serve_processes.cpu_seconds(pids) for role, pids in self._roles.items()}


@contextmanager
def engine_alone(model: str | None, options: Mapping[str, Any]) -> Iterator[Callable[[Job], float]]:
    """A function that does a job in an engine without a server, in a process of its own, and returns its seconds."""
    command = [sys.executable, str(HERE / "serve_engine.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(message: Mapping[str, Any]) -> dict[str, Any]:
        stdin.write(json.dumps(message) + "\n")
        answer = stdout.readline()
        if not answer:
            raise SystemExit(f"the in-process engine ended with code {process.wait()}, see above")
        return json.loads(answer)

    try:
        ask({"model": model, "options": options})
        yield lambda job: ask(job)["wall_s"]
    finally:
        stdin.close()
        process.wait()


class _Jobs:
    """Each has a cache salt of its own: a prefix that one run left in a cache is nobody else's."""

    def __init__(self, tokens: Sequence[int]):
        self._tokens = tokens
        self._numbers = itertools.count()

    def make(self, work: Workload) -> Job:
        prompts = serve_prompts.prompts(work, self._tokens)
        requests = [
            {"prompt": prompt, "max_tokens": output} for prompt, (_, output) in zip(prompts, work.requests, strict=True)
        ]
        salt = f"{os.getpid()}-{next(self._numbers)}"
        return {"sequential": work.sequential, "cache_salt": salt, "requests": requests}


def _running(plan: Plan, stack: ExitStack) -> AbstractContextManager[Addresses]:
    if plan.addresses is not None:
        return nullcontext(plan.addresses)
    arguments = [] if plan.model is None else [plan.model]
    for name, value in plan.options.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return serve_processes.serving(arguments, logs / "server.log")


def _same_settings(plan: Plan, status: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Model and options of an engine like the server's: sizes and dtype as it says, the rest as it was started with."""
    root = None if status["root"] == DEFAULT_MODEL else status["root"]
    given = {name: _as_flag(value) for name, value in plan.options.items() if name in ENGINE_OPTIONS}
    given.pop("kv_cache_memory_bytes", None)  # it became num_pages
    return plan.model or root, {**given, **status["info"]["limits"], "dtype": status["info"]["dtype"]}


def _as_flag(value: str) -> Any:
    """A number, true or false, or else text."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def _call(url: str, body: Mapping[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
