"""The core's process: it ends whenever it cannot serve, also while front ends are joined to it."""

import json
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from jaxserve.internal.v1 import tokens_pb2 as pb
from jaxserve.internal.v1.tokens_pb2_grpc import TokenStreamStub
from server.core.service import FRONTEND_KEY

# A core whose start-up waits for a front end, and then raises.
FAILING = """
import time
import server.core.process as process
from jaxserve.errors import ConfigError, EngineError

def start(state, options, restarts):
    while not streams:
        time.sleep(0.01)
    raise {error}

streams = []
connect = process.TokenStreamService.Connect

def noted(self, commands, context):
    streams.append(context)
    return connect(self, commands, context)

process.TokenStreamService.Connect = noted
process._start = start
process.main()
"""


@pytest.mark.parametrize(
    ("error", "code", "events"),
    [
        ("ConfigError('no such\\nthing')", 2, [{"event": "failed", "message": "no such thing"}]),
        ("RuntimeError('RESOURCE_EXHAUSTED')", 1, []),
        ("MemoryError()", 1, []),
        ("EngineError('3 device errors')", 1, [{"event": "failed", "message": "3 device errors"}]),
    ],
)
def test_start_up_that_fails_ends_the_process_whoever_is_joined_to_it(
    tmp_path: Path, error: str, code: int, events: list[dict[str, str]]
) -> None:
    address = f"unix:{tmp_path}/engine.sock"
    core = subprocess.Popen(
        [sys.executable, "-c", FAILING.format(error=error)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert core.stdin is not None and core.stdout is not None and core.stderr is not None
    core.stdin.write(json.dumps({"engine": {}, "engine_address": address, "settings": {}}) + "\n")
    core.stdin.flush()
    try:
        with grpc.insecure_channel(address) as channel:
            metadata = [(FRONTEND_KEY, "0-1")]
            commands = iter(lambda: pb.ConnectRequest(), None)
            messages = TokenStreamStub(channel).Connect(commands, metadata=metadata, wait_for_ready=True)
            with pytest.raises(grpc.RpcError):
                for _ in messages:
                    pass
        assert core.wait(30) == code
        said = [json.loads(line) for line in core.stdout]
        assert [event for event in said if event["event"] != "heartbeat"] == events
        assert events or error.partition("(")[0] in core.stderr.read()
    finally:
        core.kill()
        core.communicate()
