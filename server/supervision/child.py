"""One child process: a role goes in, its events come out on the event loop, and its end as an exit code."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Role:
    """What to start. first_line: the object the child reads first from its stdin; it alone may hold secrets."""

    name: str  # "engine core", "front end 0"
    command: tuple[str, ...]
    environment: Mapping[str, str]
    first_line: Mapping[str, Any]


class Child:
    """Runs from construction on, in a session of its own: a Ctrl-C in the terminal is the supervisor's affair alone.

    Threads read and wait, because neither a stopped reader nor a grandchild that holds the pipe may hide the end of
    the process. `on_event` runs on the loop, and `exited` is done after the last event.
    """

    def __init__(self, role: Role, on_event: Callable[[Event], None]):
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self.exited: asyncio.Future[int] = self._loop.create_future()  # negative = killed by that signal
        self._process = subprocess.Popen(
            role.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(role.environment),
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"{role.name} says", daemon=True)
        self._reader.start()
        threading.Thread(target=self._reap, name=f"{role.name} ends", daemon=True).start()
        self.send(role.first_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Mapping[str, Any]) -> None:
        """One line on its stdin; lost if the child is gone, which `exited` tells."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def hang_up(self) -> None:
        """EOF on its stdin: it exits at once."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def kill(self) -> None:
        """SIGKILL for it and for what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                except ValueError:
                    event = None
                if isinstance(event, dict) and "event" in event:
                    self._post(self._on_event, event)
                else:  # a library that prints
                    sys.stderr.write(line.decode(errors="replace"))

    def _reap(self) -> None:
        code = self._process.wait()
        self.kill()  # what it started must not outlive it: it may hold the device or the pipe
        self._reader.join()
        self._post(self._end, code)

    def _end(self, code: int) -> None:
        self.hang_up()
        if not self.exited.done():
            self.exited.set_result(code)

    def _post(self, call: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(call, *arguments)


def how_it_ended(code: int) -> str:
    """ "exited with code 3", "was killed by SIGKILL"."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
