"""`jaxserve.client` against a live server: both clients say what the engine says, and what they drop is freed."""

import asyncio
import gc
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from jaxserve.client import AsyncClient, Chunk, Client, Completion, ServerError, Tls
from jaxserve.request import SamplingParams
from server.errors import ServiceError

TEXT = "The quick brown fox"
CHAT = [{"role": "user", "content": TEXT}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
ENDLESS: dict[str, Any] = {"ignore_eos": True, "n": 4}


@pytest.fixture
def client(live: Any) -> Iterator[Client]:
    with Client(live.grpc) as connected:
        yield connected


def with_async(target: str, use: Callable[[AsyncClient], Any], **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncClient(target, **options) as client:
            return await use(client)

    return asyncio.run(main())


async def collected(chunks: Any) -> list[Chunk]:
    return [chunk async for chunk in chunks]


def same(first: Completion, second: Completion) -> bool:
    return first.outputs == second.outputs


def test_answer_is_what_the_engine_says(client: Client, live: Any) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, logprobs=2, prompt_logprobs=1, n=2)
    [expected] = live.llm.generate([TEXT], params)
    answer = client.generate(TEXT, params, return_prompt_token_ids=True)
    assert list(answer.outputs) == expected.outputs
    assert answer.text == expected.outputs[0].text
    assert [None, *answer.prompt_logprobs] == expected.prompt_logprobs
    assert list(answer.prompt_token_ids) == expected.prompt_token_ids
    assert answer.usage.completion_tokens == sum(len(output.token_ids) for output in expected.outputs)
    assert answer.model == live.model
    assert answer.timings.total > 0


def test_streams_add_up_to_the_answers(client: Client) -> None:
    for whole, pieces in (
        (client.generate(TEXT, GREEDY), list(client.stream(TEXT, GREEDY))),
        (client.chat(CHAT, GREEDY), list(client.chat_stream(CHAT, GREEDY))),
    ):
        assert "".join(chunk.text for chunk in pieces) == whole.text
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.total_tokens == whole.usage.total_tokens
        assert pieces[-1].deltas[-1].finish_reason == whole.outputs[0].finish_reason
        assert pieces[-1].timings is not None


def test_both_clients_say_the_same(client: Client, live: Any) -> None:
    async def ask(other: AsyncClient) -> None:
        assert same(await other.generate(TEXT, GREEDY), client.generate(TEXT, GREEDY))
        assert same(await other.chat(CHAT, GREEDY), client.chat(CHAT, GREEDY))
        chunks = await collected(other.stream(TEXT, GREEDY))
        assert "".join(chunk.text for chunk in chunks) == client.generate(TEXT, GREEDY).text
        chunks = await collected(other.chat_stream(CHAT, GREEDY))
        assert "".join(chunk.text for chunk in chunks) == client.chat(CHAT, GREEDY).text
        tokens = await other.tokenize(TEXT, return_texts=True)
        assert tokens == client.tokenize(TEXT, return_texts=True)
        assert await other.detokenize(tokens.ids) == client.detokenize(tokens.ids) == TEXT
        assert await other.models() == client.models() == [await other.model()] == [client.model()]
        await other.abort("gen-nobody")
        assert await other.health() is client.health() is True

    with_async(live.grpc, ask)


def test_prompt_is_text_ids_or_messages(client: Client) -> None:
    ids = client.tokenize(TEXT).ids
    assert same(client.generate(TEXT, GREEDY), client.generate(ids, GREEDY))
    assert same(client.generate(CHAT, GREEDY), client.chat(CHAT, GREEDY))
    ids = client.tokenize(CHAT).ids
    assert same(client.generate(CHAT, GREEDY), client.generate(ids, GREEDY))


def test_options_of_a_chat_reach_the_template(client: Client) -> None:
    def prompt(messages: Any, **options: Any) -> str:
        answer = client.chat(messages, max_tokens=1, return_prompt_token_ids=True, **options)
        return client.detokenize(answer.prompt_token_ids)

    assert prompt(CHAT).endswith("<|start|>assistant\n")
    assert prompt(CHAT, add_generation_prompt=False).endswith("<|end|>\n")
    final = [*CHAT, {"role": "assistant", "content": "jumps"}]
    assert prompt(final, continue_final_message=True).endswith("assistant\njumps")


def test_refusal_carries_code_field_and_request_id(client: Client) -> None:
    with pytest.raises(ServerError, match="outside") as raised:
        client.generate([1, 99_999], request_id="mine-1")
    error = raised.value
    assert (error.code, error.param, error.request_id) == ("token_out_of_range", "prompt", "mine-1")
    assert error.status is grpc.StatusCode.INVALID_ARGUMENT
    assert error.retry_after is None
    with pytest.raises(ServerError, match="outside"):
        list(client.stream([1, 99_999]))
    with pytest.raises(ServerError) as raised:
        client.generate(TEXT, model="nobody")
    assert raised.value.code == "model_not_found"


def test_async_refusal_is_the_same_exception(live: Any) -> None:
    async def ask(client: AsyncClient) -> None:
        with pytest.raises(ServerError) as raised:
            await client.generate([1, 99_999])
        assert raised.value.code == "token_out_of_range"
        with pytest.raises(ServerError) as raised:
            await collected(client.stream([1, 99_999]))
        assert raised.value.param == "prompt"

    with_async(live.grpc, ask)


def test_deadline_is_one_of_the_codes(client: Client, slow: Any) -> None:
    with pytest.raises(ServerError) as raised:
        client.generate(TEXT, timeout=0.3, **ENDLESS)
    assert raised.value.code == "deadline_exceeded"
    with pytest.raises(ServerError) as raised:
        list(client.stream(TEXT, timeout=0.3, **ENDLESS))
    assert raised.value.code == "deadline_exceeded"
    slow.assert_ended_early()


def test_closed_stream_is_cancelled(client: Client, slow: Any) -> None:
    stream = client.stream(TEXT, **ENDLESS)
    next(stream)
    stream.close()
    slow.assert_ended_early()


def test_stream_left_by_break_is_cancelled(client: Client, slow: Any) -> None:
    for _ in client.stream(TEXT, **ENDLESS):
        break
    gc.collect()
    slow.assert_ended_early()


def test_closed_async_stream_is_cancelled(live: Any, slow: Any) -> None:
    async def ask(client: AsyncClient) -> None:
        stream = client.stream(TEXT, **ENDLESS)
        await anext(stream)
        await stream.aclose()
        await asyncio.to_thread(slow.assert_ended_early)

    with_async(live.grpc, ask)


@pytest.mark.parametrize("kind", ["generate", "stream"])
def test_cancelled_task_cancels_its_call(live: Any, slow: Any, kind: str) -> None:
    async def ask(client: AsyncClient) -> None:
        call = client.generate(TEXT, **ENDLESS) if kind == "generate" else collected(client.stream(TEXT, **ENDLESS))
        task = asyncio.create_task(call)
        await asyncio.to_thread(live.until, lambda: live.frontend.engine.status.open_samples)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(slow.assert_ended_early)

    with_async(live.grpc, ask)


def test_abort_ends_a_stream(client: Client, slow: Any) -> None:
    stream = client.stream(TEXT, **ENDLESS)
    first = next(stream)
    client.abort(first.id)
    last = [first, *stream][-1]
    assert last.usage is not None
    slow.assert_ended_early()


@pytest.fixture
def failing(live: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """failing(error, times): the next calls for a model fail with it; returns the list of them."""

    def install(error: Exception, times: int) -> list[str]:
        calls: list[str] = []
        check = live.frontend.check_model

        def fail(name: str) -> str:
            calls.append(name)
            if len(calls) <= times:
                raise error
            return check(name)

        monkeypatch.setattr(live.frontend, "check_model", fail)
        return calls

    return install


SHORTLY = ServiceError("not_ready", "in a moment", retry_after=0.05)


def test_unary_call_is_tried_again_when_the_server_says_so(client: Client, failing: Any) -> None:
    calls = failing(SHORTLY, 2)
    assert client.generate(TEXT, GREEDY).text
    assert len(calls) == 3


def test_attempts_are_bounded(live: Any, client: Client, failing: Any) -> None:
    calls = failing(SHORTLY, 100)
    with pytest.raises(ServerError) as raised:
        client.generate(TEXT, GREEDY)
    assert (raised.value.code, raised.value.retry_after, len(calls)) == ("not_ready", 0.05, 3)
    with Client(live.grpc, max_attempts=1) as once, pytest.raises(ServerError):
        once.generate(TEXT, GREEDY)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "error",
    [
        ServiceError("engine_dead", "for good"),
        ServiceError("queue_full", "later", retry_after=0.05),
        ServiceError("invalid_value", "no"),
    ],
    ids=lambda error: error.code,
)
def test_what_trying_again_cannot_help_is_tried_once(client: Client, failing: Any, error: ServiceError) -> None:
    calls = failing(error, 100)
    with pytest.raises(ServerError) as raised:
        client.generate(TEXT, GREEDY)
    assert (raised.value.code, len(calls)) == (error.code, 1)


def test_streams_are_tried_once(client: Client, failing: Any) -> None:
    calls = failing(SHORTLY, 100)
    with pytest.raises(ServerError):
        list(client.stream(TEXT, GREEDY))
    assert len(calls) == 1


def test_server_that_is_not_there_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Client(f"127.0.0.1:{port}", max_attempts=1) as client, pytest.raises(ServerError) as raised:
        client.models()
    assert (raised.value.code, raised.value.request_id) == ("unavailable", "")


def test_key_tls_and_mutual_tls(start_live: Any, certificates: Path) -> None:
    files = {"ssl_certfile": "server.pem", "ssl_keyfile": "server.key", "ssl_ca_certs": "ca.pem"}
    live = start_live(api_key=("k",), **{setting: str(certificates / name) for setting, name in files.items()})
    mutual = Tls(ca=certificates / "ca.pem", cert=certificates / "client.pem", key=certificates / "client.key")
    with Client(live.grpc, tls=mutual, api_key="k") as client:
        assert client.models()
    with Client(live.grpc, tls=mutual) as client:
        assert client.health()
        with pytest.raises(ServerError) as raised:
            client.models()
        assert raised.value.code == "invalid_api_key"
    for wrong in (Tls(ca=certificates / "ca.pem"), True, False):
        with Client(live.grpc, tls=wrong, api_key="k", max_attempts=1) as client, pytest.raises(ServerError) as raised:
            client.models()
        assert raised.value.code == "unavailable"

    async def ask(client: AsyncClient) -> None:
        assert await client.models()

    with_async(live.grpc, ask, tls=mutual, api_key="k")


def test_certificate_for_another_name_is_accepted_under_that_name(start_live: Any, certificates: Path) -> None:
    files = {"ssl_certfile": "server.pem", "ssl_keyfile": "server.key"}
    live = start_live(**{setting: str(certificates / name) for setting, name in files.items()})
    port = live.grpc.rpartition(":")[2]
    ca = certificates / "ca.pem"
    with Client(f"localhost:{port}", tls=Tls(ca=ca), max_attempts=1) as client, pytest.raises(ServerError):
        client.models()
    with Client(f"localhost:{port}", tls=Tls(ca=ca, server_name="127.0.0.1")) as client:
        assert client.models()


def test_certificate_file_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pem"):
        Client("127.0.0.1:1", tls=Tls(ca="nowhere.pem"))
