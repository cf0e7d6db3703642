"""The project's own client and grpcurl against the gRPC port of the real server."""

import asyncio
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from jaxserve.client import AsyncClient, Client, ServerError
from jaxserve.errors import InvalidRequestError

pytestmark = pytest.mark.serving

GRPCURL = Path(__file__).parents[2] / ".venv-clients" / "grpcurl" / "bin" / "grpcurl"
PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Name three colours of the rainbow."}]
SERVICE = "jaxserve.v1.Inference"


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[Client]:
    with Client(server.grpc, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def grpcurl(server: Any) -> Callable[..., str]:
    """grpcurl(message, *what): what it prints; with fails=True, what it complains of."""
    assert GRPCURL.exists(), "grpcurl is not installed: make clients"

    def run(
        message: dict[str, Any] | None,
        *what: str,
        address: str = server.grpc,
        flags: tuple[str, ...] = (),
        fails: bool = False,
    ) -> str:
        data = () if message is None else ("-d", json.dumps(message))
        command = [str(GRPCURL), "-plaintext", *flags, *data, address, *what]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert bool(result.returncode) == fails, result.stderr
        return result.stderr if fails else result.stdout

    return run


def objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects that stand one after the other in a text."""
    decoder, found, position = json.JSONDecoder(), [], 0
    while text[position:].strip():
        position += len(text[position:]) - len(text[position:].lstrip())
        value, position = decoder.raw_decode(text, position)
        found.append(value)
    return found


# The project's client


def test_generate_equals_its_stream_and_rest(client: Client, server: Any) -> None:
    whole = client.generate(PROMPT, temperature=0, max_tokens=24)
    chunks = list(client.stream(PROMPT, temperature=0, max_tokens=24))
    assert "".join(chunk.text for chunk in chunks) == whole.text != ""
    ids = [token for chunk in chunks for delta in chunk.deltas for token in delta.token_ids]
    assert ids == whole.outputs[0].token_ids and len(ids) == whole.usage.completion_tokens
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and whole.model == server.model
    rest = server.post("/v1/completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 24}).json()
    assert rest["choices"][0]["text"] == whole.text


def test_chat_equals_its_stream_and_rest(client: Client, server: Any) -> None:
    whole = client.chat(MESSAGES, temperature=0, max_tokens=24)
    assert "".join(chunk.text for chunk in client.chat_stream(MESSAGES, temperature=0, max_tokens=24)) == whole.text
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    assert server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == whole.text


def test_asyncio_client_equals_the_blocking_one(client: Client, server: Any) -> None:
    prompts = [f"{number} times three is" for number in range(4)]

    async def texts() -> list[str]:
        async with AsyncClient(server.grpc) as aio:

            async def text(prompt: str) -> str:
                return "".join([chunk.text async for chunk in aio.stream(prompt, temperature=0, max_tokens=8)])

            return await asyncio.gather(*map(text, prompts))

    assert asyncio.run(texts()) == [client.generate(prompt, temperature=0, max_tokens=8).text for prompt in prompts]


def test_samples_logprobs_and_stop_strings_of_a_stream_equal_the_whole(client: Client) -> None:
    options: dict[str, Any] = {"n": 2, "seed": 5, "temperature": 1.0, "max_tokens": 16, "logprobs": 2}
    whole = client.generate(PROMPT, **options)
    assert len({output.text for output in whole.outputs}) == 2
    stop = whole.outputs[0].text.split()[2]
    stopped = client.generate(PROMPT, **options, stop=[stop])
    assert stopped.outputs[0].text == whole.outputs[0].text[: whole.outputs[0].text.index(stop)]
    assert stopped.outputs[0].finish_reason == "stop" and stopped.outputs[0].stop_reason == stop
    texts, positions = {0: "", 1: ""}, {0: 0, 1: 0}
    for chunk in client.stream(PROMPT, **options, stop=[stop]):
        for delta in chunk.deltas:
            texts[delta.index] += delta.text
            positions[delta.index] += len(delta.logprobs or ())
    assert texts == {output.index: output.text for output in stopped.outputs}
    assert positions == {output.index: len(output.token_ids) for output in stopped.outputs}


def test_tokenize_and_detokenize_are_inverse(client: Client) -> None:
    tokens = client.tokenize(PROMPT, return_texts=True)
    assert client.detokenize(tokens.ids) == PROMPT == "".join(tokens.texts)
    assert client.generate(list(tokens.ids), temperature=0, max_tokens=4).text


def test_model_and_health_are_told(client: Client, server: Any) -> None:
    assert client.health()
    assert server.model in [model.id for model in client.models()]
    assert client.model().max_model_len == 8192


def test_errors_carry_code_parameter_and_status(client: Client) -> None:
    with pytest.raises(ServerError, match="8192") as told:
        client.generate("word " * 9000)
    assert (told.value.code, told.value.status) == ("context_length_exceeded", grpc.StatusCode.INVALID_ARGUMENT)
    with pytest.raises(ServerError) as told:
        client.generate(PROMPT, model="gpt-4o")
    assert (told.value.code, told.value.param) == ("model_not_found", "model")
    assert told.value.status == grpc.StatusCode.NOT_FOUND
    with pytest.raises(InvalidRequestError, match="temperature"):
        client.generate(PROMPT, temperature=9)


def test_a_key_is_asked_for(keyed: Any) -> None:
    with Client(keyed.grpc) as client, pytest.raises(ServerError) as told:
        client.generate(PROMPT)
    assert (told.value.code, told.value.status) == ("invalid_api_key", grpc.StatusCode.UNAUTHENTICATED)
    with Client(keyed.grpc, api_key=keyed.key) as client:
        assert client.generate(PROMPT, max_tokens=2).usage.completion_tokens == 2


def test_a_stream_aborted_by_id_ends(client: Client, server: Any) -> None:
    stream = client.stream(PROMPT, max_tokens=4000, ignore_eos=True)
    client.abort(next(stream).id)
    assert [delta.finish_reason for chunk in stream for delta in chunk.deltas][-1] == "abort"
    server.assert_idle()


# grpcurl, which knows nothing of the service but what reflection tells


def test_reflection_lists_the_services(grpcurl: Callable[..., str]) -> None:
    assert {SERVICE, "grpc.health.v1.Health"} <= set(grpcurl(None, "list").split())
    assert f"{SERVICE}.GenerateStream" in grpcurl(None, "list", SERVICE).split()
    assert "rpc ChatStream" in grpcurl(None, "describe", SERVICE)


def test_health_is_serving(grpcurl: Callable[..., str]) -> None:
    assert objects(grpcurl({}, "grpc.health.v1.Health/Check")) == [{"status": "SERVING"}]
    assert objects(grpcurl({"service": SERVICE}, "grpc.health.v1.Health/Check")) == [{"status": "SERVING"}]


def test_grpcurl_streams_what_it_gets_whole(grpcurl: Callable[..., str]) -> None:
    message = {"text": PROMPT, "sampling": {"temperature": 0, "maxTokens": 12}}
    [whole] = objects(grpcurl(message, f"{SERVICE}/Generate"))
    streamed = objects(grpcurl(message, f"{SERVICE}/GenerateStream"))
    texts = [choice.get("text", "") for part in streamed for choice in part.get("choices", ())]
    assert "".join(texts) == whole["choices"][0]["text"]
    chat = {"messages": MESSAGES, "sampling": {"maxTokens": 4}}
    assert objects(grpcurl(chat, f"{SERVICE}/Chat"))[0]["usage"]["completion_tokens"] == 4


def test_grpcurl_shows_the_parameter_at_fault(grpcurl: Callable[..., str]) -> None:
    message = {"text": PROMPT, "sampling": {"temperature": 9}}
    told = grpcurl(message, f"{SERVICE}/Generate", fails=True)
    assert "InvalidArgument" in told and "temperature" in told and "INVALID_VALUE" in told


def test_grpcurl_needs_the_key(grpcurl: Callable[..., str], keyed: Any) -> None:
    message = {"text": PROMPT, "sampling": {"maxTokens": 2}}
    method = f"{SERVICE}/Generate"
    # Without reflection, which needs the key, too, nothing can be asked.
    assert "Unauthenticated" in grpcurl(message, method, address=keyed.grpc, fails=True)
    key = ("-H", f"authorization: Bearer {keyed.key}")
    assert objects(grpcurl(message, method, address=keyed.grpc, flags=key))[0]["usage"]["completion_tokens"] == 2
