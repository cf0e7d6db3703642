"""The parent's side of `template_worker.py`: one killable child process that renders templates, restarted as needed."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from jaxserve.errors import EngineError

WORKER = Path(__file__).with_name("template_worker.py")
HEADER_BYTES = 8
MEMORY_BYTES = 1 << 30
START_TIMEOUT_S = 60.0  # importing jinja2 on a busy machine
BYTES_PER_CHAR = 12  # of ASCII-only JSON, at worst
MESSAGE_BYTES = 1 << 16


class RenderTimeoutError(Exception):
    """The child was killed at the deadline."""


class WorkerDiedError(Exception):
    """The child ended, or sent what it never should, before it had answered."""


class TemplateProcess:
    """Renders in a child process, one request at a time; thread-safe. The child starts at the first request.

    Whatever happens to the child (deadline, out of memory, killed from outside), the next request finds a fresh one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, template: str, context: dict[str, Any], max_chars: int, timeout_s: float) -> dict[str, str]:
        """Return the child's answer, {"text"} or {"error", "message"}.

        Raises `RenderTimeoutError`, `WorkerDiedError`, `EngineError` where no child can be started, and `TypeError`,
        `ValueError` or `RecursionError` where `context` is not JSON.
        """
        request = {"template": template, "context": context, "max_chars": max_chars, "timeout_s": timeout_s}
        body = json.dumps(request).encode()
        limit = max_chars * BYTES_PER_CHAR + MESSAGE_BYTES
        with self._lock:
            reused = self._child is not None and self._child.poll() is None
            try:
                return self._exchange(body, limit, timeout_s)
            except WorkerDiedError:
                if not reused:
                    raise
                return self._exchange(body, limit, timeout_s)  # the old child may have died before it was asked

    def close(self) -> None:
        """End the child; a later request would start another."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # closing stdin writes out what it still buffers
                        stream.close()

    def _exchange(self, body: bytes, limit: int, timeout_s: float) -> dict[str, str]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            try:
                self._child = _start()
                self._within(START_TIMEOUT_S, self._child, b"", limit)
            except (OSError, RenderTimeoutError, WorkerDiedError) as error:
                raise EngineError("the chat template process did not start; see its message on stderr") from error
        return self._within(timeout_s, self._child, body, limit)

    def _within(self, seconds: float, child: subprocess.Popen[bytes], body: bytes, limit: int) -> dict[str, str]:
        """Write one frame (none if `body` is empty) and read one, killing the child when `seconds` are over."""
        assert child.stdin is not None and child.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            child.kill()  # ends the blocking read or write below

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            if body:
                child.stdin.write(len(body).to_bytes(HEADER_BYTES, "big") + body)
                child.stdin.flush()
            answer = _read_frame(child.stdout, limit)
        except BaseException as error:
            timer.cancel()
            self.close()
            if expired.is_set():
                raise RenderTimeoutError from None
            if isinstance(error, OSError | EOFError | ValueError):
                raise WorkerDiedError from error
            raise
        timer.cancel()
        timer.join()  # a deadline met this late kills the child before the next request looks at it
        return answer


def _start() -> subprocess.Popen[bytes]:
    # A session of its own keeps Ctrl-C in the terminal from the child; its end is ours to decide.
    return subprocess.Popen(
        [sys.executable, "-I", "-B", str(WORKER), str(MEMORY_BYTES), *_package_dirs()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def _package_dirs() -> list[str]:
    """Where this process finds jinja2 and what it imports: the child's own search path may be shorter."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    origins = [spec.origin for spec in specs if spec is not None and spec.origin is not None]
    return sorted({str(Path(origin).parents[1]) for origin in origins})


def _read_frame(stream: IO[bytes], limit: int) -> dict[str, str]:
    header = stream.read(HEADER_BYTES)
    size = int.from_bytes(header, "big")
    if len(header) < HEADER_BYTES or size > limit:
        raise EOFError
    body = stream.read(size)
    if len(body) < size:
        raise EOFError
    return json.loads(body)
