"""The lines to try can be pasted as they are, and show no key."""

import ast
import inspect
import json
import shlex
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from jaxserve.client import Client
from jaxserve.v1.inference_pb2 import GenerateStreamRequest
from server.settings import ServerSettings
from server.supervision.banner import banner
from server.supervision.ports import Ports

PORTS = Ports(rest=8000, grpc=50051, admin=8081)
TLS = {"ssl_certfile": "c.pem", "ssl_keyfile": "k.pem"}


def words(text: str, program: str) -> list[str]:
    """The line of a program, as a shell takes it apart."""
    [line] = [line for line in text.splitlines() if line.startswith(f"{program} ")]
    return shlex.split(line)


def python(text: str, title: str) -> str:
    return text.partition(f"# {title}\n")[2].partition("\n\n")[0]


def shown(model: str = "tiny", **settings: Any) -> str:
    return banner(ServerSettings(**settings), PORTS, model)


@pytest.mark.parametrize("model", ["tiny", 'it\'s a "model" for $5 `and` more'])
def test_curl_streams_a_chat_and_its_body_survives_the_shell(model: str) -> None:
    command = words(shown(model), "curl")
    assert "http://127.0.0.1:8000/v1/chat/completions" in command
    body = json.loads(command[command.index("-d") + 1])
    assert body["model"] == model and body["stream"] is True


def test_grpcurl_calls_the_streaming_method_in_plain_text() -> None:
    command = words(shown(), "grpcurl")
    assert command[-2:] == ["127.0.0.1:50051", "jaxserve.v1.Inference/GenerateStream"]
    assert "-plaintext" in command
    body = json.loads(command[command.index("-d") + 1])
    assert ParseDict(body, GenerateStreamRequest()).text == body["text"]


@pytest.mark.parametrize("settings", [{}, {"api_key": ("k1",)}])
@pytest.mark.parametrize("title", ["Python, any OpenAI client", "Python, gRPC"])
def test_python_lines_are_python_and_import_what_they_use(settings: dict[str, Any], title: str) -> None:
    source = python(shown(**settings), title)
    tree = ast.parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert names & {"OpenAI", "Client"}
    assert ("os" in names) == ("import os" in source) == bool(settings)


@pytest.mark.parametrize("settings", [{}, {"api_key": ("k1",), **TLS}])
def test_our_client_takes_what_the_python_lines_give_it(settings: dict[str, Any]) -> None:
    tree = ast.parse(python(shown(**settings), "Python, gRPC"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    [made] = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Client"]
    [called] = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "stream"]
    inspect.signature(Client).bind(*made.args, **{str(word.arg): word.value for word in made.keywords})
    inspect.signature(Client.stream).bind(None, *called.args)


def test_a_key_is_asked_for_and_never_shown() -> None:
    text = shown(api_key=("secret-key",))
    assert "secret-key" not in text
    assert "authorization: Bearer $JAXSERVE_API_KEY" in words(text, "curl")
    assert "authorization: Bearer $JAXSERVE_API_KEY" in words(text, "grpcurl")
    assert "authorization" not in shown()


def test_with_tls_every_public_address_is_https_and_grpcurl_is_not_in_plain_text() -> None:
    text = shown(**TLS)
    assert "http://127.0.0.1:8000" not in text
    assert "https://127.0.0.1:8000/health/ready" in text
    assert "http://127.0.0.1:8081/metrics" in text
    assert "-plaintext" not in text
    assert "--cert" in words(shown(**TLS, ssl_ca_certs="ca.pem"), "curl")


@pytest.mark.parametrize(
    ("host", "dialled"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("10.1.2.3", "10.1.2.3"), ("box.lan", "box.lan")],
)
def test_addresses_can_be_dialled(host: str, dialled: str) -> None:
    assert f"http://{dialled}:8000/health/ready" in shown(host=host)


def test_the_page_is_named_only_where_there_is_one() -> None:
    assert "browser" in shown()
    assert "browser" not in shown(playground=False)
