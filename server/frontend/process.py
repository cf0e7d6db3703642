"""A front-end process, and `--in-process`, which is a front end with the engine beside it.

A process of its own gets one JSON object on the first line of standard input (see `server/supervisor.py`), commands on
the others, and the end of the supervisor as the end of that stream. It answers on standard output; people read stderr.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import uvloop

from jaxserve.engine.text_front import check_text
from jaxserve.errors import EngineError, JaxserveError
from server.frontend.engine_client import EngineClient
from server.frontend.frontend import Frontend
from server.frontend.remote_engine import RemoteEngine
from server.frontend.servers import Servers, open_servers
from server.observability.logs import IntervalLog, RequestLog, configure_logging
from server.observability.tracing import request_traces
from server.settings import ServeConfig
from server.supervision.ports import Ports

logger = logging.getLogger(__name__)

EXIT_FAILED, EXIT_REFUSED = 1, 2
STOP_SECONDS = 1.0  # for protocols to say goodbye, once nothing runs any more

OnReady = Callable[[Frontend, Ports], None]


def main() -> None:
    """`python -m server.frontend`: until drained, or the end of standard input. Exit code 2: it cannot serve at all."""
    hello = json.loads(sys.stdin.readline())
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is for people
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the supervisor decides
    config, index = ServeConfig.from_json(hello), hello["index"]
    configure_logging(config.server, f"frontend-{index}")

    async def run() -> None:
        engine = RemoteEngine(hello["engine_address"], f"{index}-{os.getpid()}")
        drain = asyncio.Event()
        _listen_to_supervisor(engine, drain)
        await serve(
            config,
            engine,
            Ports(**hello["ports"]),
            index,
            drain,
            lambda frontend, _: _tell(out, {"event": "ready", "model": frontend.model_names[0]}),
            lambda: _tell(out, {"event": "drain"}),
        )

    try:
        uvloop.run(run())
    except JaxserveError as error:
        out.write(json.dumps({"event": "failed", "message": " ".join(str(error).split())}) + "\n")
        os._exit(EXIT_REFUSED)
    except BaseException:
        logger.exception("the front end failed")
        os._exit(EXIT_FAILED)
    os._exit(0)  # threads that still tokenize for nobody need not be waited for


def run_in_process(config: ServeConfig, ports: Ports, on_ready: OnReady) -> None:
    """Everything in this process, until SIGTERM or SIGINT; a second one ends it at once, with exit code 0.

    Raises what the engine's start-up raises.
    """
    configure_logging(config.server, "jaxserve")
    check_text(config.engine)  # before minutes of loading
    from server.core.start import start_engine  # imports JAX
    from server.frontend.local_engine import LocalEngine

    engine = LocalEngine(*start_engine(config.engine))

    async def run() -> None:
        drain = asyncio.Event()

        def signalled() -> None:
            if drain.is_set():
                os._exit(0)
            drain.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, signalled)
        await serve(config, engine, ports, 0, drain, on_ready)

    uvloop.run(run())


async def serve(
    config: ServeConfig,
    engine: EngineClient,
    ports: Ports,
    index: int,
    drain: asyncio.Event,
    on_ready: OnReady,
    request_drain: Callable[[], None] | None = None,
) -> None:
    """One front end from its start to the end of its drain. Its doors are open, and say so, before it is ready.

    request_drain: asks for `drain` to be set, here and in every other front end; None = sets it.

    Raises ConfigError or a ModelError where it can never be ready. That the engine never will be, health tells.
    """
    traces = request_traces(config.server)
    frontend = Frontend(config.server, config.engine, engine, index=index)
    frontend.metrics.listen(RequestLog(config.server))
    if traces is not None:
        frontend.metrics.listen(traces)
    await frontend.start()
    servers = await open_servers(frontend, ports)
    ready = asyncio.create_task(_announce(frontend, servers, on_ready))
    asked = asyncio.create_task(drain.wait())
    background: list[asyncio.Task[Any]] = [ready, asked]
    if index == 0:
        background.append(asyncio.create_task(IntervalLog(config.server, lambda: engine.status).run()))
    frontend.drain_requested = request_drain or drain.set
    try:
        await asyncio.wait([ready, asked], return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
        await asked
        frontend.begin_drain()
        await frontend.drained(config.server.drain_timeout)
    finally:
        for task in background:
            task.cancel()
        await servers.stop(STOP_SECONDS)
        await frontend.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)


async def _announce(frontend: Frontend, servers: Servers, on_ready: OnReady) -> None:
    try:
        await frontend.wait_ready()
    except EngineError as error:
        logger.error("%s", error)  # the supervisor knows, and health says so
        return
    on_ready(frontend, servers.ports)


def _tell(out: Any, event: dict[str, Any]) -> None:
    line = json.dumps(event) + "\n"
    threading.Thread(target=out.write, args=(line,), daemon=True).start()  # a suspended supervisor reads nothing


def _listen_to_supervisor(engine: RemoteEngine, drain: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def act(command: dict[str, Any]) -> None:
        if command["command"] == "drain":
            drain.set()
        elif command["command"] == "engine":
            engine.supervised(command["phase"], command["detail"])

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(act, json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
