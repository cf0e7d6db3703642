"""Ways to do harm (raw sockets, messages past the client's own checks), and golden streams that must not notice.

The tests here are numbered: each docstring begins with the line it shows of the project's list of 38 faults and bad
inputs. Lines 18 to 20 and 25 are about grammars and tool calls, which the server does not have; 31 and 34 are also in
`test_lifecycle.py`.
"""

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from jaxserve.client.errors import ServerError, server_error
from jaxserve.v1 import inference_pb2 as pb
from jaxserve.v1.inference_pb2_grpc import InferenceStub

GOLDEN = {
    "prompt": "Once upon a time, in a village by the sea,",
    "temperature": 0,
    "frequency_penalty": 0.5,  # it would repeat itself, and a repeated token would not show
    "ignore_eos": True,
    "max_tokens": 300,
    "return_token_ids": True,
}
AFTERMATH = 4  # tokens a golden stream must bring after whatever was done beside it


@dataclass
class Answer:
    """What came back through a raw socket. status: None = it was closed without a word."""

    status: int | None
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


def exchange(port: int, data: bytes | Iterable[bytes], timeout: float = 60.0) -> Answer:
    """Sends bytes as they are, and reads one response. A server that hangs up early is no error."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        with suppress(ConnectionError):
            for part in [data] if isinstance(data, bytes) else data:
                sock.sendall(part)
        return read_answer(sock)


def read_answer(sock: socket.socket) -> Answer:
    response = http.client.HTTPResponse(sock)
    try:
        response.begin()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    except (ConnectionError, http.client.BadStatusLine, http.client.IncompleteRead):
        return Answer(None, {}, b"")


def request(body: bytes, *headers: str, route: str = "/v1/completions", length: int | None = None) -> bytes:
    """A POST of these bytes as they are."""
    lines = [f"POST {route} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body) if length is None else length}"]
    if not any(header.lower().startswith("content-type") for header in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


class Wire:
    """The functions above, and refusals of one server in one line."""

    exchange, request, read_answer = staticmethod(exchange), staticmethod(request), staticmethod(read_answer)

    def __init__(self, server: Any):
        self._server = server
        self._channel = grpc.insecure_channel(server.grpc)
        self.stub = InferenceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def raw(self, body: bytes, *headers: str, **options: Any) -> Answer:
        """The answer to these bytes as a body."""
        return exchange(self._server.port, request(body, *headers, **options))

    def refused(self, body: dict[str, Any], code: str, param: str | None = None, status: int = 400) -> str:
        """The message of a refusal: of a chat where `body` has messages, else of a completion; whole and streamed."""
        chat = "messages" in body
        route = "/v1/chat/completions" if chat else "/v1/completions"
        given = {"max_tokens": 2, **({} if chat else {"prompt": "Hello"}), **body}
        for stream in (False, True):
            answer = self._server.post(route, {**given, "stream": stream})
            assert answer.status_code == status, answer.text
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and answer.headers["x-request-id"]
            assert (error["code"], error["param"]) == (code, param), error
        return error["message"]

    def refused_grpc(
        self, code: str, param: str | None = None, status: str = "INVALID_ARGUMENT", metadata: Any = (), **fields: Any
    ) -> str:
        """The message of a refusal of Generate with these fields."""
        with pytest.raises(grpc.RpcError) as failed:
            self.stub.Generate(pb.GenerateRequest(**fields), timeout=60, metadata=metadata)
        told: ServerError = server_error(failed.value)
        assert (told.code, told.param, told.status.name) == (code, param, status), told
        return str(told)


@pytest.fixture(scope="session")
def wire_to() -> Iterator[Callable[[Any], Wire]]:
    """wire_to(server): what can be done to it."""
    wires: list[Wire] = []

    def to(server: Any) -> Wire:
        wires.append(Wire(server))
        return wires[-1]

    yield to
    for wire in wires:
        wire.close()


@pytest.fixture(scope="session")
def wire(server: Any, wire_to: Callable[[Any], Wire]) -> Wire:
    return wire_to(server)


class Golden:
    """Greedy streams, one after the other, from `start` to `check`; each must bring what an undisturbed one brought."""

    def __init__(self, server: Any, body: dict[str, Any], expected: dict[str, Any]):
        self._server, self._body, self._expected = server, body, expected
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._enough = threading.Event()
        self._error: BaseException | None = None
        self.tokens = 0  # of all its streams

    def start(self) -> None:
        self._thread.start()
        self.wait_for(1)

    def wait_for(self, tokens: int) -> None:
        """Until so many more have come."""
        goal = self.tokens + tokens
        self._server.until(
            lambda: self.tokens >= goal or self._error, f"the golden stream brought {tokens} tokens", 180
        )

    def check(self) -> None:
        """What was done is over: the stream goes on, and is what it would have been."""
        try:
            self.wait_for(AFTERMATH)
        finally:
            self.stop()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        self._enough.set()
        self._thread.join(120)
        assert not self._thread.is_alive(), "the golden stream hangs"

    def _run(self) -> None:
        try:
            while not self._enough.is_set():
                self._one_stream()
        except BaseException as error:  # of a thread: raised by `check`
            self._error = error

    def _one_stream(self) -> None:
        choices: dict[int, dict[str, Any]] = {}
        for event in self._server.events("/v1/completions", self._body):
            assert "error" not in event, event
            self._server.add_choice(choices, event["choices"][0])
            self.tokens += len(event["choices"][0].get("token_ids", ()))
            ids, text = choices[0]["token_ids"], choices[0]["text"]
            assert ids == self._expected["token_ids"][: len(ids)], "the golden stream was disturbed"
            assert self._expected["text"].startswith(text), "the golden stream was disturbed"
            if self._enough.is_set():
                return
        assert choices[0]["text"] == self._expected["text"]
        assert choices[0]["finish_reason"] == "length"


@pytest.fixture(scope="session")
def undisturbed() -> Callable[..., dict[str, Any]]:
    """undisturbed(server, body): the golden answer, made once for each model, while nothing else goes on."""
    known: dict[str, dict[str, Any]] = {}

    def ask(server: Any, body: dict[str, Any]) -> dict[str, Any]:
        if server.model not in known:
            answer = server.post("/v1/completions", body)
            assert answer.status_code == 200, answer.text
            known[server.model] = answer.json()["choices"][0]
        return known[server.model]

    return ask


@pytest.fixture(scope="session")
def golden_beside(undisturbed: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """`with golden_beside(server): …`: what is done to it disturbs no other stream, and is no failure to log."""

    @contextmanager
    def beside(server: Any, **changes: Any) -> Iterator[Golden]:
        body = GOLDEN | changes
        stream, begin = Golden(server, body, undisturbed(server, body)), server.log_size()
        stream.start()
        try:
            yield stream
        except BaseException:
            stream.stop()
            raise
        stream.check()
        assert server.failures(begin) == []

    return beside


@pytest.fixture
def golden(server: Any, golden_beside: Callable[..., Any]) -> Iterator[Golden]:
    """A golden stream beside the whole test."""
    with golden_beside(server) as stream:
        yield stream
