"""The processes of a server on this machine: started and stopped here, found by their port, and what they consume."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 900.0  # a first start compiles
STOP_SECONDS = 60.0
READY = re.compile(r"is ready: REST on (http\S+), gRPC on (\S+)$.*^metrics +(http\S+)/metrics$", re.M | re.S)
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Addresses:
    rest: str  # "http://127.0.0.1:8000"
    grpc: str  # "127.0.0.1:50051"
    admin: str


@contextmanager
def serving(
    arguments: Sequence[str],
    log: Path,
    ports: Sequence[int] = (0, 0, 0),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Addresses]:
    """`jaxserve serve` with these arguments until the end of the block; what it prints goes to `log`.

    ports: REST, gRPC, admin; 0 = any free one. environment: its variables, None = those of this process.
    """
    command = [sys.executable, "-P", "-m", "server", "serve", *arguments]
    for flag, port in zip(("--port", "--grpc-port", "--admin-port"), ports, strict=True):
        command += [flag, str(port)]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment)
    try:
        yield _wait_ready(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_ready(process: "subprocess.Popen[bytes]", log: Path) -> Addresses:
    deadline = time.monotonic() + START_SECONDS
    while (found := READY.search(log.read_text(errors="replace"))) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the server did not get ready:\n{log.read_text(errors='replace')}")
        time.sleep(0.1)
    return Addresses(rest=found[1], grpc=found[2], admin=found[3])


def roles(port: int) -> dict[str, list[int]]:
    """Role -> process ids of the server that listens on `port`; {} if that is not a process of this machine."""
    listeners = {
        connection.pid
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid
    }
    found: dict[str, list[int]] = {}
    for pid in sorted(listeners):
        supervisor = psutil.Process(pid).parent()
        family = [] if supervisor is None else [supervisor, *supervisor.children()]
        named = {process.pid: role for process in family if (role := _role(process)) is not None}
        if "core" not in named.values():  # --in-process
            named = {pid: "all"}
        for member, role in named.items():
            if member not in found.setdefault(role, []):
                found[role].append(member)
    return found


def _role(process: psutil.Process) -> str | None:
    command = process.cmdline()
    for module, role in (("server.core", "core"), ("server.frontend", "front end")):
        if module in command:
            return role
    return "supervisor" if "serve" in command else None


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time these processes have used so far, all their threads together, to the nanosecond."""
    libc = ctypes.CDLL(None, use_errno=True)
    total = 0.0
    for pid in pids:
        clock = ctypes.c_int()
        if error := libc.clock_getcpuclockid(pid, ctypes.byref(clock)):
            raise OSError(error, os.strerror(error), f"process {pid}")
        total += time.clock_gettime(clock.value)
    return total


def memory_mib(pids: Sequence[int]) -> dict[str, float]:
    """Resident memory now, and at its highest, in MiB; pages that several share count for each."""
    now = peak = 0
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        now += int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])
        peak += int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
    return {"now": round(now * 1024 / MIB, 1), "peak": round(peak * 1024 / MIB, 1)}
