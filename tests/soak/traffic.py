"""Everything clients do to a server, well-behaved or not, at once; a process of its own, started by test_soak.py.

    python traffic.py '{"rest": "http://…", "grpc": "host:port", "admin": "http://…", "workers": 16}'

A line {"seed", "seconds"} on stdin in; one {"done": {deed: {outcome: count}}, "wrong": [sentences]} on stdout out, when
every connection of that round is closed. wrong: what a client may not see, such as a 5xx that is no deadline.
"""

import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from jaxserve.client import AsyncClient, ServerError

WORDS = ("The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "Sätze", "äöü", "日本語", "😀", "user")
LATE = "deadline_exceeded"
BAD_BODIES: tuple[tuple[int, bytes], ...] = (
    (400, b"{"),
    (400, b"[" * 5000),
    (400, b'{"prompt": "a", "temperature": NaN}'),
    (400, b'{"prompt": "a", "max_tokens": 0}'),
    (400, b'{"prompt": "a", "n": 1000000000}'),
    (400, b'{"prompt": "a", "temprature": 1}'),
    (400, b'{"prompt": [99999999]}'),
    (400, b'{"prompt": []}'),
    (400, b'{"prompt": "' + b"fox " * 5000 + b'"}'),
    (400, b'{"prompt": "a", "logprobs": 1000}'),
    (404, b'{"model": "another", "prompt": "a"}'),
    (413, b'{"prompt": "' + b"a" * (5 << 20) + b'"}'),
)


@dataclass
class Worker:
    """One client at a time. tally: (deed, outcome) -> times."""

    where: dict[str, Any]
    rng: random.Random
    http: httpx.AsyncClient
    grpc: AsyncClient
    tally: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            deed = self.rng.choice(DEEDS)
            name = deed.__name__
            try:
                async with asyncio.timeout(60):
                    outcome = await deed(self)
            except Exception as error:  # of whatever kind: it is told, with the deed
                self.wrong.append(f"{name}: {error!r}")
                continue
            self.tally[name, outcome] += 1

    def text(self) -> str:
        return " ".join(self.rng.choices(WORDS, k=self.rng.randint(1, 12)))

    def messages(self) -> list[dict[str, str]]:
        turns = [{"role": "user", "content": self.text()}, {"role": "assistant", "content": self.text()}]
        return [*turns[: self.rng.choice((0, 2))], {"role": "user", "content": self.text()}]

    def sampling(self) -> dict[str, Any]:
        """What both protocols call the same."""
        options: dict[str, Any] = {"max_tokens": self.rng.randint(1, 40), "temperature": self.rng.choice((0, 0.8))}
        extras: list[dict[str, Any]] = [
            {},
            {"n": 3, "temperature": 1.0},
            {"seed": 7, "top_p": 0.9, "top_k": 20},
            {"stop": ["a", "the fox"]},
            {"frequency_penalty": 0.5, "logit_bias": {3: 2.0}},
        ]
        return {**options, **self.rng.choice(extras)}

    async def post(self, route: str, body: Any, **headers: str) -> httpx.Response:
        """Raises AssertionError for a status that no well-behaved client may see."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"content-type": "application/json"} | {key.replace("_", "-"): value for key, value in headers.items()}
        answer = await self.http.post(self.where["rest"] + route, content=content, headers=sent)
        assert answer.status_code < 500 or answer.status_code == 504, f"{answer.status_code} {answer.text}"
        return answer

    def outcome(self, answer: httpx.Response, *codes: str) -> str:
        """ "ok", or the code of a refusal that is among these or comes of the load."""
        if answer.status_code == 200:
            return "ok"
        code = answer.json()["error"]["code"]
        assert code in ("queue_full", *codes), f"{answer.status_code} {answer.text}"
        return f"refused: {code}"


async def completion(worker: Worker) -> str:
    body = {"prompt": worker.text(), **worker.sampling(), "logprobs": worker.rng.choice((None, 2))}
    return worker.outcome(await worker.post("/v1/completions", body))


async def completions_of_a_list(worker: Worker) -> str:
    body = {"prompt": [worker.text() for _ in range(3)], "max_tokens": 8, "echo": True, "return_timings": True}
    return worker.outcome(await worker.post("/v1/completions", body))


async def chat(worker: Worker) -> str:
    return worker.outcome(await worker.post("/v1/chat/completions", {"messages": worker.messages()} | short(worker)))


async def streamed_chat(worker: Worker) -> str:
    return await stream(worker, "/v1/chat/completions", {"messages": worker.messages()} | worker.sampling())


async def streamed_completion(worker: Worker) -> str:
    return await stream(worker, "/v1/completions", {"prompt": worker.text()} | worker.sampling())


async def stream_left_early(worker: Worker) -> str:
    """After some events, or before the first."""
    body = {"prompt": worker.text(), "max_tokens": 200, "ignore_eos": True}
    return await stream(worker, "/v1/completions", body, events=worker.rng.randint(0, 20))


async def stream(worker: Worker, route: str, body: dict[str, Any], events: int | None = None) -> str:
    """events: how many to read before the connection is dropped; None = all."""
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with worker.http.stream("POST", worker.where["rest"] + route, json=body) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return worker.outcome(answer)
        seen = 0
        async for line in answer.aiter_lines():
            if seen == events:
                return "left"
            assert '"error"' not in line, line
            seen += line.startswith("data: ")
            if line == "data: [DONE]":
                return "ok"
    raise AssertionError("the stream ended without [DONE]")


async def timeout(worker: Worker) -> str:
    seconds = worker.rng.choice(("0.001", "0.02", "0.1"))
    body = {"prompt": worker.text(), "max_tokens": 200, "ignore_eos": True}
    return worker.outcome(await worker.post("/v1/completions", body, x_request_timeout=seconds), LATE)


async def bad_input(worker: Worker) -> str:
    status, body = worker.rng.choice(BAD_BODIES)
    answer = await worker.post("/v1/completions", body)
    assert answer.status_code in (status, 429), f"{body[:60]!r} was answered with {answer.status_code} {answer.text}"
    return f"refused: {answer.json()['error']['code']}"


async def tokenize(worker: Worker) -> str:
    text = worker.text()
    ids = (await worker.post("/tokenize", {"prompt": text, "add_special_tokens": False})).json()["tokens"]
    assert (await worker.post("/detokenize", {"tokens": ids})).json()["prompt"] == text
    return "ok"


async def look(worker: Worker) -> str:
    admin, rest = worker.where["admin"], worker.where["rest"]
    pages = [rest + path for path in ("/health/live", "/health/ready", "/v1/models", "/version", "/openapi.json")]
    pages += [f"{admin}/metrics", f"{admin}/admin/status", f"{rest}/v1/engine/status"]
    answer = await worker.http.get(worker.rng.choice(pages))
    assert answer.status_code == 200, answer.text
    return "ok"


async def new_connection(worker: Worker) -> str:
    async with httpx.AsyncClient(timeout=60) as http:
        answer = await http.get(worker.where["rest"] + "/v1/models")
    assert answer.status_code == 200, answer.text
    return "ok"


async def broken_connection(worker: Worker) -> str:
    """Nothing, half a request, or noise; then gone, without or with a reset."""
    where = urlsplit(worker.where["rest"])
    half = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    sent = worker.rng.choice((b"", b"GET /hea", half, b"\x16\x03\x01" + worker.rng.randbytes(200)))
    _, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(sent)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
        if worker.rng.random() < 0.5:
            writer.transport.abort()
        writer.close()
        await writer.wait_closed()
    return "left"


async def gone_while_generating(worker: Worker) -> str:
    """A request that is answered whole, whose client does not wait for it."""
    where = urlsplit(worker.where["rest"])
    body = json.dumps({"prompt": worker.text(), "max_tokens": 200, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    _, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(head.encode() + b"\r\n\r\n" + body)
    await writer.drain()
    await asyncio.sleep(worker.rng.random() * 0.1)
    writer.transport.abort()
    return "left"


async def grpc_generate(worker: Worker) -> str:
    return await told(worker.grpc.generate(worker.text(), **worker.sampling()))


async def grpc_chat(worker: Worker) -> str:
    return await told(worker.grpc.chat(worker.messages(), **short(worker)))


async def grpc_stream(worker: Worker) -> str:
    async def read() -> None:
        async for _ in worker.grpc.chat_stream(worker.messages(), **worker.sampling()):
            pass

    return await told(read())


async def grpc_stream_left(worker: Worker) -> str:
    async def read() -> None:
        left = worker.rng.randint(0, 20)
        async with contextlib.aclosing(worker.grpc.stream(worker.text(), max_tokens=200, ignore_eos=True)) as chunks:
            async for _ in chunks:
                if not left:
                    return
                left -= 1

    return await told(read())


async def grpc_abort(worker: Worker) -> str:
    async def read() -> None:
        aborted = False
        async for chunk in worker.grpc.stream(worker.text(), max_tokens=200, ignore_eos=True):
            if not aborted:
                aborted = True
                await worker.grpc.abort(chunk.id)

    return await told(read())


async def grpc_deadline(worker: Worker) -> str:
    seconds = worker.rng.choice((0.005, 0.02, 0.1))
    call = worker.grpc.generate(worker.text(), max_tokens=200, ignore_eos=True, timeout=seconds)
    return await told(call, LATE)


async def grpc_bad_input(worker: Worker) -> str:
    bad: tuple[dict[str, Any], ...] = (
        {"prompt": [99_999_999]},
        {"prompt": "fox " * 5000},
        {"prompt": ""},
        {"prompt": "a", "model": "another"},
        {"prompt": "a", "logprobs": 1000},
    )
    given = worker.rng.choice(bad)
    codes = ("token_out_of_range", "context_length_exceeded", "empty_prompt", "model_not_found", "invalid_value")
    outcome = await told(worker.grpc.generate(**given), *codes)
    assert outcome != "ok", f"{given} was accepted"
    return outcome


async def grpc_tokenize(worker: Worker) -> str:
    text = worker.text()
    tokens = await worker.grpc.tokenize(text, add_special_tokens=False)
    assert await worker.grpc.detokenize(tokens.ids) == text
    return "ok"


async def grpc_new_connection(worker: Worker) -> str:
    async with AsyncClient(worker.where["grpc"], timeout=60) as client:
        assert await client.health()
        await client.models()
    return "ok"


async def told(call: Awaitable[Any], *codes: str) -> str:
    """ "ok", or the code of a refusal that is among these or comes of the load; any other is raised."""
    try:
        await call
    except ServerError as error:
        if error.code not in ("queue_full", *codes):
            raise AssertionError(f"{error.code}: {error}") from None
        return f"refused: {error.code}"
    return "ok"


def short(worker: Worker) -> dict[str, Any]:
    return {"max_tokens": worker.rng.randint(1, 10)}


DEEDS: tuple[Callable[[Worker], Awaitable[str]], ...] = (
    completion,
    completions_of_a_list,
    chat,
    streamed_chat,
    streamed_completion,
    stream_left_early,
    timeout,
    bad_input,
    tokenize,
    look,
    new_connection,
    broken_connection,
    gone_while_generating,
    grpc_generate,
    grpc_chat,
    grpc_stream,
    grpc_stream_left,
    grpc_abort,
    grpc_deadline,
    grpc_bad_input,
    grpc_tokenize,
    grpc_new_connection,
)


async def one_round(where: dict[str, Any], seed: int, seconds: float) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=where["workers"])
    async with httpx.AsyncClient(timeout=60, limits=limits) as http, AsyncClient(where["grpc"], timeout=60) as grpc:
        workers = [Worker(where, random.Random(f"{seed} {i}"), http, grpc) for i in range(where["workers"])]
        until = time.monotonic() + seconds
        await asyncio.gather(*(worker.run(until) for worker in workers))
    done: dict[str, Counter[str]] = {}
    for worker in workers:
        for (name, outcome), count in worker.tally.items():
            done.setdefault(name, Counter())[outcome] += count
    return {"done": done, "wrong": [sentence for worker in workers for sentence in worker.wrong]}


def main() -> None:
    where = json.loads(sys.argv[1])
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(asyncio.run(one_round(where, order["seed"], order["seconds"]))), flush=True)


if __name__ == "__main__":
    main()
