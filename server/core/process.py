"""The engine core process: settings come on standard input, heartbeats on standard output, tokens through a socket.

Standard input's first line is one JSON object {"engine": options, "engine_address": "unix:/...", "restarts": number};
its end means that the supervisor is gone, and so shall this process be. People read standard error.
"""

import json
import logging
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from jaxserve.config import EngineConfig
from jaxserve.errors import EngineError, JaxserveError
from jaxserve.internal.v1.tokens_pb2_grpc import add_TokenStreamServicer_to_server
from server.core.service import CoreState, TokenStreamService
from server.settings import ServerSettings

HEARTBEAT_EVERY = 1.0  # seconds
MAX_MESSAGE_BYTES = 256 << 20  # a front end is no stranger
STREAM_THREADS = 66  # one per front end, and some for those that come back
EXIT_FAILED, EXIT_REFUSED = 1, 2

logger = logging.getLogger(__name__)


def main() -> None:
    """Runs until SIGTERM or the end of standard input; exit code 2 for a model or settings that cannot be served.

    Every way out is os._exit: an ordinary one would wait for the threads of JAX and gRPC.
    """
    hello = json.loads(sys.stdin.readline())
    _own_stdout = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not look like a heartbeat
    out = os.fdopen(_own_stdout, "w", buffering=1)
    state = CoreState()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_supervisor, daemon=True).start()
    threading.Thread(target=_heartbeat, args=(state, out), daemon=True).start()
    from server.observability.logs import configure_logging

    configure_logging(ServerSettings(**hello.get("settings", {})), "core")
    server = grpc.server(
        ThreadPoolExecutor(STREAM_THREADS),
        options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)],
    )
    add_TokenStreamServicer_to_server(TokenStreamService(state), server)
    server.add_insecure_port(hello["engine_address"])
    server.start()
    try:
        _start(state, hello["engine"], hello.get("restarts", 0))
    except JaxserveError as error:
        _tell(out, {"event": "failed", "message": " ".join(str(error).split())})
        os._exit(EXIT_FAILED if isinstance(error, EngineError) else EXIT_REFUSED)
    except BaseException:
        logger.exception("the engine could not be started")
        os._exit(EXIT_FAILED)
    _tell(out, {"event": "ready"})
    while not stop.wait(0.2):
        assert state.engine is not None
        if state.engine.error is not None:
            logger.error("the engine stopped: %s", state.engine.error)
            os._exit(EXIT_FAILED)  # the supervisor starts another
    server.stop(grace=0.5).wait()
    os._exit(0)


def _start(state: CoreState, options: dict[str, Any], restarts: int) -> None:
    from server.core.start import start_engine  # imports JAX, which takes a while: the heartbeat is on by now

    state.ready(*start_engine(EngineConfig.from_options(**options), state.report, restarts))


def _heartbeat(state: CoreState, out: Any) -> None:
    beat = threading.Event()
    while True:
        _tell(out, {"event": "heartbeat", "phase": state.phase, "detail": state.detail, "step_age": state.step_age})
        beat.wait(HEARTBEAT_EVERY)


def _tell(out: Any, message: dict[str, Any]) -> None:
    try:
        out.write(json.dumps(message) + "\n")
    except OSError:
        os._exit(EXIT_FAILED)


def _exit_with_supervisor() -> None:
    while sys.stdin.readline():
        pass
    os._exit(0)
