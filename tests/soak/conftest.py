"""A real `jaxserve serve` with the tiny model, watched from outside while a process of its own plays the clients."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).parents[2]
WORKERS = 16
# Few slots and a short queue: requests wait, are refused, and lose their pages to each other.
FLAGS = {
    "max_num_seqs": 6,
    "max_num_batched_tokens": 64,
    "num_pages": 65,
    "page_size": 8,
    "max_model_len": 256,
    "max_num_queued_reqs": 10,
    "dtype": "float32",
    "log_interval": 3600,
}
SETTLE_SECONDS = 60.0
LAZY = {"threads": 4, "open_files": 4}  # how many more a pool may yet add after the warm-up, over the whole time


@dataclass(frozen=True, kw_only=True)
class State:
    """What an idle server holds. resident: bytes, by role; memory_blocks: of the front end's Python objects."""

    calls: int  # that clients have made until then
    open_calls: int
    open_samples: int
    pages_used: int
    tasks: int
    open_files: dict[str, int]
    threads: dict[str, int]
    resident: dict[str, int]
    memory_blocks: int

    def above(self, other: "State") -> dict[str, Any]:
        """What this one has more of: memory aside, and what pools may add (LAZY)."""
        mine, others = asdict(self), asdict(other)
        grown = {}
        for name in ("open_calls", "open_samples", "pages_used", "tasks", "open_files", "threads"):
            pairs = [("", mine[name], others[name])]
            if isinstance(mine[name], dict):
                pairs = [(f" of {role}", count, others[name][role]) for role, count in mine[name].items()]
            allowed = LAZY.get(name, 0)
            grown |= {name + of: f"{now}, was {then}" for of, now, then in pairs if now > then + allowed}
        return grown


class Soak:
    """The server, the clients, and both together."""

    def __init__(self, addresses: Any, roles: dict[str, list[int]], log: Path, clients: "subprocess.Popen[str]"):
        self.addresses = addresses
        self.log = log
        self.calls = 0
        self.done: dict[str, dict[str, int]] = {}  # deed -> outcome -> times
        self._processes = {role: psutil.Process(pids[0]) for role, pids in roles.items()}
        self._clients = clients

    def round(self, seed: int, seconds: float) -> None:
        """Clients do what they do for so long, and go. Raises AssertionError for what they may not see."""
        assert self._clients.stdin is not None and self._clients.stdout is not None
        self._clients.stdin.write(json.dumps({"seed": seed, "seconds": seconds}) + "\n")
        report = json.loads(self._clients.stdout.readline())
        assert not report["wrong"], report["wrong"][:10]
        for deed, outcomes in report["done"].items():
            for outcome, times in outcomes.items():
                seen = self.done.setdefault(deed, {})
                seen[outcome] = seen.get(outcome, 0) + times
                self.calls += times

    def settled(self, baseline: State | None = None) -> State:
        """The state once nothing runs and, where given, nothing is above the baseline; else fails and names what is."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            state = self.state()
            idle = not (state.open_calls or state.open_samples or state.pages_used)
            if idle and (baseline is None or not state.above(baseline)):
                return state
            above = {} if baseline is None else state.above(baseline)
            assert time.monotonic() < deadline, f"after {SETTLE_SECONDS:g} s without clients: {above or state}"
            time.sleep(0.2)

    def state(self) -> State:
        told = httpx.get(f"{self.addresses.admin}/admin/status").json()
        process, engine = told["process"], told["engine"]
        return State(
            calls=self.calls,
            open_calls=process["open_calls"],
            open_samples=engine["open_samples"],
            pages_used=engine["stats"]["pages_used"],
            tasks=process["tasks"],
            open_files={role: process.num_fds() for role, process in self._processes.items()},
            threads={role: process.num_threads() for role, process in self._processes.items()},
            resident={role: process.memory_info().rss for role, process in self._processes.items()},
            memory_blocks=process["memory_blocks"],
        )

    def golden(self) -> str:
        """What is generated for one prompt, whatever else happened."""
        body = {"prompt": "The quick brown fox", "max_tokens": 48, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{self.addresses.rest}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.addresses.admin}/metrics").text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"jaxserve:{name}{{")]
        assert values, f"/metrics has no {name}"
        return sum(values)

    def complaints(self) -> list[str]:
        """Lines of its log that are errors or hold a traceback."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if "Traceback" in line or " ERROR " in line or " CRITICAL " in line]

    def alive(self) -> bool:
        """Every process is the one that was started."""
        return all(process.is_running() for process in self._processes.values())


@pytest.fixture
def soak(tiny_model: Path, xla_cache: Path, tmp_path: Path) -> Iterator[Soak]:
    processes = _serve_processes()
    flags = {**FLAGS, "compilation_cache_dir": xla_cache}
    arguments = [str(tiny_model), *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAXSERVE_")}
    log = tmp_path / "server.log"
    with processes.serving(arguments, log, environment=environment) as addresses:
        where = json.dumps({**vars(addresses), "workers": WORKERS})
        clients = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("traffic.py"), where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        try:
            yield Soak(addresses, processes.roles(httpx.URL(addresses.rest).port), log, clients)
        finally:
            clients.kill()
            clients.communicate()


def _serve_processes() -> Any:
    """The module of the benchmarks that starts servers and finds their processes."""
    spec = importlib.util.spec_from_file_location("serve_processes", ROOT / "benchmarks" / "serve_processes.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
