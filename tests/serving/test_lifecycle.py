"""Signals to every process of a server: drains, restarts, and an engine killed under load."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest

from jaxserve.client import Client
from jaxserve.v1 import inference_pb2 as pb
from jaxserve.v1.inference_pb2_grpc import InferenceStub

pytestmark = pytest.mark.serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}
LOGPROB_TOLERANCE = 1e-3  # a resumed stream's prompt is computed in other pieces


# Signals to the supervisor


def test_sigterm_refuses_what_is_new_and_finishes_what_runs(start_server: Callable[..., Any]) -> None:
    server = start_server("--drain-timeout=120")
    body = LONG | {"max_tokens": 200}
    with ThreadPoolExecutor() as pool, httpx.Client(base_url=server.rest) as kept:
        kept.get("/version")  # a connection from before
        running = [pool.submit(server.streamed, COMPLETIONS, body | {"seed": seed}) for seed in range(3)]
        server.until(lambda: server.metric("num_requests_running") == 3, "three streams run")
        server.terminate()
        server.until(lambda: server.health().status_code == 503, "it is not ready")
        assert "draining" in server.health().json()["cause"]
        assert server.health("/health/live").status_code == 200
        for post in (kept.post, lambda route, json: server.post(route, json)):
            refused = post(COMPLETIONS, json={"prompt": "Hello"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
        with Client(server.grpc, max_attempts=1) as client:
            assert not client.health()
            with pytest.raises(Exception, match="draining"):
                client.generate("Hello")
        for answer in running:
            assert answer.result()["choices"][0]["finish_reason"] == "length"
            assert answer.result()["error"] is None
    assert server.wait() == 0


def test_what_outlives_the_drain_timeout_ends_with_an_error_event(start_server: Callable[..., Any]) -> None:
    server = start_server("--drain-timeout=1")
    stub = InferenceStub(grpc.insecure_channel(server.grpc))
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(server.post, COMPLETIONS, LONG)
        stream = pool.submit(server.streamed, COMPLETIONS, LONG)
        message = pb.GenerateRequest(text="Once", sampling=pb.SamplingParams(ignore_eos=True))
        call = stub.Generate.future(message, timeout=60)
        server.until(lambda: server.metric("num_requests_running") == 3, "all run")
        server.terminate()
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "draining")
        assert stream.result()["error"]["code"] == "draining" and stream.result()["choices"][0]["text"]
        assert call.code() == grpc.StatusCode.UNAVAILABLE and "drain" in call.details()
    assert server.wait() == 0


def test_a_second_sigterm_ends_the_server_at_once(start_server: Callable[..., Any]) -> None:
    server = start_server()
    children = [server.core, *server.frontends]
    stream = server.events(COMPLETIONS, LONG)
    next(stream)
    server.terminate()
    server.until(lambda: server.health().status_code == 503, "it drains")
    assert server.process.poll() is None
    server.terminate()
    assert server.wait(10) == 0
    server.until(lambda: not any(child.is_running() for child in children), "nothing is left of it")
    with pytest.raises((httpx.TransportError, AssertionError)):
        list(stream)


def test_the_end_of_the_supervisor_is_the_end_of_all(start_server: Callable[..., Any]) -> None:
    """kill -9: its children notice by themselves, and nothing holds the ports."""
    server = start_server()
    children = [server.core, *server.frontends]
    server.process.kill()
    server.until(lambda: not any(child.is_running() for child in children), "nothing is left of it")
    server.wait()
    with pytest.raises(httpx.TransportError):
        server.health("/health/live")


# Signals to the others


def streams(server: Any) -> Iterator[Callable[[], dict[str, Any]]]:
    """The load: REST and gRPC, greedy and sampled, with penalties, logprobs, several samples and stop strings."""
    chat = {"messages": [{"role": "user", "content": "Tell me a long story."}], "return_token_ids": True}
    sampled = {"ignore_eos": True, "max_tokens": 150, "return_token_ids": True}
    bodies: list[tuple[str, dict[str, Any]]] = [
        (CHAT, chat | {"temperature": 0, "max_tokens": 150}),
        (CHAT, chat | {"seed": 3, "temperature": 0.9, "top_p": 0.9, "max_tokens": 150, "logprobs": True}),
        (COMPLETIONS, sampled | {"prompt": "One", "temperature": 0, "logprobs": 2}),
        (COMPLETIONS, sampled | {"prompt": "Two", "seed": 11, "temperature": 1, "frequency_penalty": 1.0, "n": 2}),
        (COMPLETIONS, sampled | {"prompt": "Three", "seed": 12, "repetition_penalty": 1.3, "presence_penalty": 0.5}),
        (COMPLETIONS, sampled | {"prompt": ["Four", "Five"], "seed": 13, "top_k": 20, "min_p": 0.05}),
        (COMPLETIONS, sampled | {"prompt": "Six", "seed": 14, "logit_bias": {"28": -20}, "stop": ["\n\n\n", "xyzzy"]}),
    ]
    for route, body in bodies:
        yield lambda route=route, body=body: server.streamed(route, body)
    for prompt, options in (
        ("Seven", {"temperature": 0, "max_tokens": 150, "ignore_eos": True}),
        ("Eight", {"seed": 15, "temperature": 0.8, "max_tokens": 150, "ignore_eos": True, "logprobs": 1, "n": 2}),
    ):
        yield lambda prompt=prompt, options=options: over_grpc(server, prompt, options)


def over_grpc(server: Any, prompt: str, options: dict[str, Any]) -> dict[str, Any]:
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    with Client(server.grpc) as client:
        for chunk in client.stream(prompt, **options):
            usage = chunk.usage and vars(chunk.usage)
            for delta in chunk.deltas:
                blank = {"text": "", "token_ids": [], "logprobs": [], "finish_reason": None}
                choice = choices.setdefault(delta.index, blank)
                choice["text"] += delta.text
                choice["token_ids"] += delta.token_ids
                choice["logprobs"] += [next(iter(entry.values())).logprob for entry in delta.logprobs or ()]
                choice["finish_reason"] = delta.finish_reason
    return {"choices": choices, "usage": usage, "error": None}


def assert_same(disturbed: dict[str, Any], expected: dict[str, Any]) -> None:
    assert disturbed["error"] is None, disturbed["error"]
    assert disturbed["choices"].keys() == expected["choices"].keys()
    for index, choice in expected["choices"].items():
        other = disturbed["choices"][index]
        assert other["token_ids"] == choice["token_ids"] and other["text"] == choice["text"]
        assert other["finish_reason"] == choice["finish_reason"] is not None
        assert other["logprobs"] == pytest.approx(choice["logprobs"], abs=LOGPROB_TOLERANCE)


def test_streams_outlive_three_deaths_of_the_engine(start_server: Callable[..., Any]) -> None:
    """kill -9 of the core under load, three times: every stream goes on with exactly what it would have had."""
    server = start_server("--max-num-queued-reqs=64")
    load = [*streams(server)]
    with ThreadPoolExecutor(len(load)) as pool:
        undisturbed = [future.result() for future in [pool.submit(stream) for stream in load]]
        server.assert_idle()
        disturbed: list[Future[dict[str, Any]]] = [pool.submit(stream) for stream in load]
        for number in range(1, 4):
            begun = server.metric("generation_tokens_total")
            server.until(lambda begun=begun: server.metric("generation_tokens_total") > begun + 100, "tokens come", 120)
            assert not all(future.done() for future in disturbed), "nothing is left to disturb"
            server.core.send_signal(signal.SIGKILL)
            server.until(lambda number=number: server.metric("engine_restarts_total") == number, "it is back", 300)
        for future, expected in zip(disturbed, undisturbed, strict=True):
            assert_same(future.result(), expected)
    assert server.health().status_code == 200
    assert server.health().json()["restarts"] == 3
    server.assert_idle()


def test_the_death_of_one_front_end_is_no_other_ones(start_server: Callable[..., Any]) -> None:
    """With --frontends 2: its own streams break, the other's go on, and another one takes its place."""
    server = start_server("--frontends=2", "--max-num-queued-reqs=64")
    body = LONG | {"max_tokens": 500, "temperature": 0, "return_token_ids": True}
    expected = server.post(COMPLETIONS, body).json()["choices"][0]
    broken, whole = [], []

    def read() -> None:
        try:
            whole.append(server.streamed(COMPLETIONS, body))
        except (httpx.TransportError, AssertionError) as error:
            broken.append(error)

    readers = [threading.Thread(target=read) for _ in range(8)]
    for reader in readers:
        reader.start()
    server.until(lambda: server.metric("open_requests") == 8, "all are accepted")
    first, second = server.frontends
    first.send_signal(signal.SIGKILL)
    server.until(lambda: len(server.frontends) == 2 and first not in server.frontends, "it is restarted")
    for reader in readers:
        reader.join()
    assert second in server.frontends and len(broken) + len(whole) == 8
    for answer in whole:
        assert answer["error"] is None
        assert answer["choices"][0]["token_ids"] == expected["token_ids"]
    # The kernel spreads connections as it likes; that all went one way is possible, and then shows one half only.
    print(f"{len(broken)} streams broke with their front end, {len(whole)} went on")
    server.assert_idle()
    for _ in range(20):  # both answer
        assert server.post(COMPLETIONS, {"prompt": "Hello", "max_tokens": 1}).status_code == 200


def test_a_stopped_engine_makes_the_server_unready_with_a_cause(start_server: Callable[..., Any]) -> None:
    """SIGSTOP on the core: 503 within 10 s and why; SIGCONT: ready again, and the stream goes on."""
    server = start_server()
    expected = server.post(COMPLETIONS, LONG | {"temperature": 0, "max_tokens": 200}).json()["choices"][0]["text"]
    with ThreadPoolExecutor() as pool:
        stream = pool.submit(server.streamed, COMPLETIONS, LONG | {"temperature": 0, "max_tokens": 200})
        server.until(lambda: server.metric("num_requests_running"), "it runs")
        core = server.core
        core.send_signal(signal.SIGSTOP)
        try:
            server.until(lambda: server.health().status_code == 503, "it is not ready", timeout=10)
            assert "the engine process has said nothing for" in server.health().json()["cause"]
            assert server.health("/health/live").status_code == 200
            with Client(server.grpc) as client:
                assert not client.health()
        finally:
            core.send_signal(signal.SIGCONT)
        server.until(lambda: server.health().status_code == 200, "it is ready again")
        assert stream.result()["choices"][0]["text"] == expected
    assert server.metric("engine_restarts_total") == 0
