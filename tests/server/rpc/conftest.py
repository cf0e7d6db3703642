"""Raw stubs on live servers, certificates, and how a call was refused."""

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from jaxserve.v1.inference_pb2_grpc import InferenceStub


@dataclass(frozen=True)
class Refusal:
    """What one failed call said."""

    status: str
    reason: str | None = None  # of ErrorInfo
    field: str | None = None  # of BadRequest
    retry_after: float | None = None  # of RetryInfo, seconds
    message: str = ""
    metadata: tuple[tuple[str, Any], ...] = ()


def _refusal(error: Any) -> Refusal:
    found: dict[str, Any] = {}
    rich = rpc_status.from_call(error)
    for detail in () if rich is None else rich.details:
        kind = detail.TypeName().rpartition(".")[2]
        message = getattr(error_details_pb2, kind)()
        detail.Unpack(message)
        if kind == "ErrorInfo":
            assert message.domain == "jaxserve"
            found["reason"] = message.reason
        elif kind == "BadRequest":
            assert message.field_violations[0].description == rich.message
            found["field"] = message.field_violations[0].field
        else:
            found["retry_after"] = message.retry_delay.ToMilliseconds() / 1000
    metadata = tuple(error.trailing_metadata() or ())
    return Refusal(error.code().name, message=error.details(), metadata=metadata, **found)


@pytest.fixture(scope="session")
def refused() -> Callable[[Callable[[], Any]], Refusal]:
    """refused(call): makes the call, reads all of its stream if it has one, and returns how it was refused."""

    def refuse(call: Callable[[], Any]) -> Refusal:
        with pytest.raises(grpc.RpcError) as raised:
            answer = call()
            if isinstance(answer, grpc.Call):
                list(answer)
        return _refusal(raised.value)

    return refuse


@pytest.fixture
def connect() -> Iterator[Callable[..., InferenceStub]]:
    """connect(target, credentials=None, **options): a stub; its channel closes with the test."""
    channels = []

    def open_channel(target: str, credentials: Any = None, **options: Any) -> InferenceStub:
        pairs = [(f"grpc.{name}", value) for name, value in options.items()]
        channel = (
            grpc.secure_channel(target, credentials, pairs) if credentials else grpc.insecure_channel(target, pairs)
        )
        channels.append(channel)
        stub = InferenceStub(channel)
        stub.channel = channel
        return stub

    yield open_channel
    for channel in channels:
        channel.close()


@pytest.fixture
def stub(live: Any, connect: Callable[..., InferenceStub]) -> InferenceStub:
    return connect(live.grpc)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with NAME.pem and NAME.key of: ca, server and client (signed by it), stranger (signed by itself)."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "stranger"):
        openssl(
            "req", "-x509", *key, "-days", "2", "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"
        )
    (folder / "names").write_text("subjectAltName = IP:127.0.0.1")
    sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
    for name in ("server", "client"):
        openssl("req", "-new", *key, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl("x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.pem")
    return folder


class SlowSteps:
    """Every step of the engine takes a while, so that a full answer, at 250 steps, outlasts what a test does to it."""

    def __init__(self, live: Any):
        self._live = live
        self._taken = 0
        self._step = live.llm._loop.core.step

    def step(self) -> Any:
        self._taken += 1
        time.sleep(0.04)
        return self._step()

    def assert_ended_early(self) -> None:
        """Nothing is left of any request, and it was not because they came to their end."""
        self._live.assert_idle()
        assert self._taken < 200


@pytest.fixture
def slow(live: Any, monkeypatch: pytest.MonkeyPatch) -> SlowSteps:
    steps = SlowSteps(live)
    monkeypatch.setattr(live.llm._loop.core, "step", steps.step)
    return steps
