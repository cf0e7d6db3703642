"""What `jaxserve serve` prints for people: each line it says to try does what it says, and Ctrl-C ends it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.serving

ROOT = Path(__file__).parents[2]
GRPCURL = ROOT / ".venv-clients" / "grpcurl" / "bin"
SECTION = re.compile(r"^# (.+)\n((?:.+\n)+)", re.MULTILINE)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory, small_flags: tuple[str, ...]) -> Iterator[str]:
    """Everything it says until it is ready. It is ended as from a terminal."""
    log = tmp_path_factory.mktemp("printed") / "log"
    command = [str(Path(sys.executable).with_name("jaxserve")), "serve", *small_flags]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--port=0", "--grpc-port=0", "--admin-port=0"], stdout=out, stderr=out)
    try:
        while "stop     Ctrl-C" not in (text := log.read_text()):
            assert process.poll() is None, text
            time.sleep(0.1)
        yield text
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()


@pytest.fixture(scope="module")
def section(printed: str) -> Callable[[str], str]:
    """section(title): the lines under it."""
    found = dict(SECTION.findall(printed))
    return lambda title: found[title]


def run(command: list[str], **options: Any) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_shows_the_memory_plan_before_it_loads(printed: str) -> None:
    begun = re.search("engine core: (loading|compiling)", printed)  # told every second, so a fast load is skipped
    assert begun is not None and printed.index("KV pool") < begun.start() < printed.index("is ready: REST on")


def test_the_curl_line_streams_an_answer(section: Callable[[str], str]) -> None:
    events = run(["bash", "-c", section("curl")]).split("\n\n")
    assert events[0].startswith("data: {") and events[-2] == "data: [DONE]" and len(events) > 5


def test_the_grpcurl_line_streams_an_answer(section: Callable[[str], str]) -> None:
    path = f"{GRPCURL}{os.pathsep}{os.environ['PATH']}"
    assert '"text"' in run(["bash", "-c", section("grpcurl")], env={**os.environ, "PATH": path})


@pytest.mark.parametrize("title", ["Python, any OpenAI client", "Python, gRPC"])
def test_the_python_lines_print_an_answer(section: Callable[[str], str], title: str) -> None:
    assert run([sys.executable, "-c", section(title)]).strip()


@pytest.mark.parametrize("name", ["browser", "health", "metrics"])
def test_the_addresses_answer(printed: str, name: str) -> None:
    found = re.search(rf"^{name} +(http\S+)$", printed, re.MULTILINE)
    assert found is not None and httpx.get(found[1]).status_code == 200
