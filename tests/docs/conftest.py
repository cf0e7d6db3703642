"""A server with the default model for everything the documents show, on the ports they name where those are free."""

import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DEFAULT_PORTS = (8000, 50051, 8081)  # REST, gRPC, admin


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Variables of a shell in which the project is installed, and nothing of it is set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAXSERVE_", "OPENAI_"))}
    programs = [Path(sys.executable).parent, ROOT / ".venv-clients" / "grpcurl" / "bin"]
    path = os.pathsep.join([*map(str, programs), kept.get("PATH", "")])
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Any]:
    """.rest, .grpc, .admin of a server that runs; it ends with the module, for it takes memory."""
    spec = importlib.util.spec_from_file_location("serve_processes", ROOT / "benchmarks" / "serve_processes.py")
    assert spec is not None and spec.loader is not None
    processes = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(processes)
    log = tmp_path_factory.mktemp("served") / "server.log"
    ports = DEFAULT_PORTS if free(DEFAULT_PORTS) else (0, 0, 0)
    with processes.serving([], log, ports, environment) as found:
        yield found
    assert "Traceback" not in log.read_text(errors="replace"), log.read_text(errors="replace")


@pytest.fixture(scope="module")
def here(addresses: Any) -> Callable[[str], str]:
    """here(text): the default ports in a text replaced by those of the server that runs."""
    real = [address.rpartition(":")[2] for address in (addresses.rest, addresses.grpc, addresses.admin)]

    def replace(text: str) -> str:
        for port, other in zip(DEFAULT_PORTS, real, strict=True):
            text = text.replace(f":{port}", f":{other}")
        return text

    return replace


def free(ports: tuple[int, ...]) -> bool:
    with ExitStack() as stack:
        for port in ports:
            try:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                return False
    return True
