"""The supervisor: settings and reserved ports go in; an engine core and front ends run until a signal or their end.

It imports neither JAX nor a web framework and holds no request, so there is little that could end it.

What it and its children say to each other, in lines that hold one JSON object each:

    stdin of a child   first line   {"settings", "engine", "engine_address": "unix:/…/engine.sock",
                                     "ports": {"rest", "grpc", "admin"}, "index"}
                                    settings and engine are ServeConfig.to_json; index counts the front ends. The core
                                    gets no ports, no index and no API keys, but "restarts": the cores before it.
                       then         {"command": "drain"}: refuse what is new, finish within drain_timeout, exit 0
                                    {"command": "engine", "phase": "restarting" | "dead", "detail"}, to front ends
                       end          the supervisor is gone or done: exit at once
    stdout of a child  {"event": "ready"}       from now on it answers requests. A front end listens on its ports long
                                                before; it adds "model", the name its responses carry
                       {"event": "drain"}          a front end was asked to end the server: as if by SIGTERM
                       {"event": "heartbeat", "phase", "detail"}  the core, every second, from its first moment on
                       {"event": "failed", "message"}             before it exits with code 2: the operator's fault

A child writes these from a thread that may block, because a supervisor that is suspended reads nothing. Whatever else
appears on its stdout goes to stderr.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import server
from jaxserve.errors import ConfigError
from server.observability.multiprocess import front_end_died, share_environment
from server.settings import ServeConfig
from server.settings_sources import PREFIX
from server.supervision.banner import announce
from server.supervision.child import Event, Role
from server.supervision.keeper import FirstStartError, Keeper, RestartPolicy
from server.supervision.ports import Ports

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2
MAX_SOCKET_PATH = 100  # bytes; the kernel's limit is 108
# On the stream between core and front end gRPC's older poller wakes half as many threads a message. They would take the
# cores of an engine on a CPU: a single stream decodes 1 to 2% faster.
CORE_GRPC = {"GRPC_EXPERIMENTS": "-event_engine_listener"}
FRONTEND_GRPC = {"GRPC_EXPERIMENTS": "-event_engine_client"}
REAP_SECONDS = 2.0  # for what was killed; a process that hangs in a driver takes longer, and is not waited for


@dataclass(frozen=True, kw_only=True)
class Commands:
    """What the children are started with. -P: a folder named server where the user happens to be is not ours."""

    core: tuple[str, ...] = (sys.executable, "-P", "-m", "server.core")
    frontend: tuple[str, ...] = (sys.executable, "-P", "-m", "server.frontend")


COMMANDS, POLICY = Commands(), RestartPolicy()


@dataclass(frozen=True)
class Outcome:
    """error: why it ended, for people; None = it was asked to."""

    exit_code: int
    error: str | None = None


def supervise(
    config: ServeConfig, ports: Ports, *, commands: Commands = COMMANDS, policy: RestartPolicy = POLICY
) -> Outcome:
    """Blocks until everything has ended. SIGTERM or SIGINT drains, a second one ends at once; both are no error."""
    with _runtime_directory() as directory:
        return asyncio.run(Supervisor(config, ports, directory, commands, policy).run())


class Supervisor:
    """One run. directory: private, holds the core's socket and the metrics that front ends share."""

    def __init__(self, config: ServeConfig, ports: Ports, directory: Path, commands: Commands, policy: RestartPolicy):
        self._config = config
        self._ports = ports
        self._policy = policy
        self._socket = directory / "engine.sock"
        self._metrics = directory / "metrics" if config.server.frontends > 1 else None
        self._model = ""
        self._announced = False
        self._phase = ""
        self._signals = 0
        self._core_starts = 0
        self._drain = asyncio.Event()
        self._core = self._core_keeper(commands)
        shared = share_environment(self._metrics) if self._metrics is not None else {}
        self._frontends = [self._frontend_keeper(commands, index, shared) for index in range(config.server.frontends)]

    async def run(self) -> Outcome:
        loop = asyncio.get_running_loop()
        body = asyncio.create_task(self._run())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number, body)
        try:
            return await body
        except asyncio.CancelledError:
            return Outcome(EXIT_OK)
        finally:
            for keeper in self._keepers:
                keeper.retire()
                keeper.kill()

    @property
    def _keepers(self) -> list[Keeper]:
        return [self._core, *self._frontends]

    def _signalled(self, number: int, body: asyncio.Task[Outcome]) -> None:
        self._signals += 1
        name = signal.Signals(number).name
        if self._signals > 1:
            logger.warning("%s again: ending at once", name)
            body.cancel()
            return
        self._begin_drain(name)

    def _begin_drain(self, why: str) -> None:
        """Front ends refuse what is new, end what runs, and exit. The core goes on meanwhile, restarted if it dies."""
        if self._drain.is_set():
            return
        logger.info("%s: finishing what runs, for up to %g s", why, self._config.server.drain_timeout)
        self._drain.set()
        self._send_off()

    def _send_off(self) -> None:
        for keeper in self._frontends:
            keeper.retire()
            keeper.send({"command": "drain"})

    async def _run(self) -> Outcome:
        core = asyncio.create_task(self._keep_core())
        frontends = [asyncio.create_task(keeper.run()) for keeper in self._frontends]
        drain = asyncio.create_task(self._drain.wait())
        tasks = [core, *frontends]
        try:
            await asyncio.wait([drain, *tasks], return_when=asyncio.FIRST_COMPLETED)
            if self._drain.is_set():
                outcome = Outcome(EXIT_OK)
            else:
                outcome = _outcome(next(task for task in tasks if task.done()))
                self._send_off()
            if outcome.exit_code != EXIT_REFUSED:  # else nothing ever ran
                await self._finish(frontends)
            await self._dismiss(tasks)
            return outcome
        finally:
            for task in (drain, *tasks):
                task.cancel()
            await asyncio.gather(drain, *tasks, return_exceptions=True)

    async def _keep_core(self) -> str | None:
        reason = await self._core.run()
        if reason is not None:
            self._tell_frontends("dead", reason)
        return reason

    async def _finish(self, frontends: list[asyncio.Task[str | None]]) -> None:
        seconds = self._config.server.drain_timeout + self._policy.drain_overrun
        _, late = await asyncio.wait(frontends, timeout=seconds)
        if late:
            logger.warning("%d front end(s) did not finish within %g s and are killed", len(late), seconds)

    async def _dismiss(self, tasks: list[asyncio.Task[str | None]]) -> None:
        """Ends whatever is left: those that drained have ended, the others get EOF, and SIGKILL if they stay."""
        for keeper in self._keepers:
            keeper.retire()
        for keeper in self._frontends:
            keeper.kill()
        self._core.hang_up()
        _, late = await asyncio.wait(tasks, timeout=self._policy.drain_overrun)
        if late:
            self._core.kill()
            await asyncio.wait(late, timeout=REAP_SECONDS)

    def _core_keeper(self, commands: Commands) -> Keeper:
        first = self._config.to_json() | {"engine_address": self._address}
        first["settings"] = first["settings"] | {"api_key": []}

        def prepare() -> None:
            self._socket.unlink(missing_ok=True)
            first["restarts"] = self._core_starts
            self._core_starts += 1

        role = Role(name="engine core", command=commands.core, environment=CORE_GRPC | _environment(), first_line=first)
        return Keeper(
            role,
            self._policy,
            on_event=self._core_says,
            on_down=self._core_down,
            before_start=prepare,
            silence=self._policy.core_timeout,
        )

    def _frontend_keeper(self, commands: Commands, index: int, shared: dict[str, str]) -> Keeper:
        first = self._config.to_json() | {
            "engine_address": self._address,
            "ports": self._ports.to_json(),
            "index": index,
        }
        role = Role(
            name=f"front end {index}",
            command=commands.frontend,
            environment=FRONTEND_GRPC | _environment() | shared,
            first_line=first,
        )
        return Keeper(role, self._policy, on_event=self._frontend_says, on_down=partial(self._frontend_down, index))

    @property
    def _address(self) -> str:
        return f"unix:{self._socket}"

    def _core_says(self, event: Event) -> None:
        phase = str(event.get("phase", ""))
        if event["event"] == "heartbeat" and phase != self._phase:
            self._phase = phase
            # Where people watch, the core's own progress bars say it.
            logger.log(logging.DEBUG if sys.stderr.isatty() else logging.INFO, "engine core: %s", phase)
        self._announce()

    def _frontend_says(self, event: Event) -> None:
        self._model = str(event.get("model") or self._model)
        if event["event"] == "drain":
            self._begin_drain("asked through the admin port")
        self._announce()

    def _core_down(self, detail: str) -> None:
        logger.error("%s", detail)
        self._tell_frontends("restarting", detail)

    def _frontend_down(self, index: int, detail: str) -> None:
        logger.error("%s", detail)
        pid = self._frontends[index].pid
        if self._metrics is not None and pid is not None:
            front_end_died(self._metrics, pid)

    def _tell_frontends(self, phase: str, detail: str) -> None:
        for keeper in self._frontends:
            keeper.send({"command": "engine", "phase": phase, "detail": detail})

    def _announce(self) -> None:
        """Prints the lines to try when everybody is ready for the first time."""
        if not self._announced and all(keeper.ready for keeper in self._keepers):
            self._announced = True
            announce(self._config.server, self._ports, self._model)


def _outcome(task: asyncio.Task[str | None]) -> Outcome:
    try:
        return Outcome(EXIT_FAILED, task.result())
    except FirstStartError as error:
        return Outcome(error.code, str(error))


def _environment() -> dict[str, str]:
    """The children's. Settings reach them through the pipe only, and they find the packages this process runs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    assert server.__file__ is not None
    root = Path(server.__file__).parents[1]
    if root.name not in ("site-packages", "dist-packages"):  # a source tree; the others are on the path anyway
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), environment.get("PYTHONPATH")]))
    return environment


@contextlib.contextmanager
def _runtime_directory() -> Iterator[Path]:
    """A folder of this user alone, gone afterwards. Raises ConfigError if its path is too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="jaxserve-", ignore_cleanup_errors=True) as name:
        if len(os.fsencode(name)) + len("/engine.sock") > MAX_SOCKET_PATH:
            raise ConfigError(f"TMPDIR={tempfile.gettempdir()!r} is too long a path for a socket in it")
        yield Path(name)
