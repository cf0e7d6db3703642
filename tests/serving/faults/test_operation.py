"""What goes wrong while requests run: a full queue, deadlines, an engine that dies, a model that cannot be used."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from jaxserve.v1 import inference_pb2 as pb

pytestmark = pytest.mark.serving

CHAT = "/v1/chat/completions"
LONG = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True}
CAPACITY = 10  # samples that `keyed` holds: 8 run, 2 wait


def conversation(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 2}


def test_a_template_that_never_ends_fails_its_request_alone(keyed: Any, golden_beside: Any) -> None:
    """22: a loop, a string of 10 GB, output without end; others are answered meanwhile."""
    with golden_beside(keyed), ThreadPoolExecutor() as pool:
        for content in ("loop", "bomb", "flood"):
            hostile = pool.submit(keyed.post, CHAT, conversation(content))
            friendly = pool.submit(keyed.post, CHAT, conversation("Hello"))
            answer = hostile.result()
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "template_timeout"), answer.text
            assert "chat template" in answer.json()["error"]["message"]
            assert friendly.result().status_code == 200, friendly.result().text


def test_a_full_queue_refuses_and_says_when_to_come_back(
    keyed: Any, wire_to: Callable[[Any], Any], golden_beside: Any
) -> None:
    """29: 429 queue_full with Retry-After, RESOURCE_EXHAUSTED with RetryInfo; room comes back."""
    metadata = tuple(keyed.headers.items())
    with golden_beside(keyed):
        running = keyed.events("/v1/completions", LONG | {"n": CAPACITY - 1})
        next(running)
        for _ in range(3):
            answer = keyed.post("/v1/completions", LONG)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert int(answer.headers["retry-after"]) >= 1 and int(answer.headers["retry-after-ms"]) >= 1
        told = wire_to(keyed).refused_grpc("queue_full", None, "RESOURCE_EXHAUSTED", metadata, text="Hello")
        assert "max_num_queued_reqs" in told
        running.close()
        short = {"prompt": "Hello", "max_tokens": 1}
        keyed.until(lambda: keyed.post("/v1/completions", short).status_code == 200, "there is room again")
    assert keyed.metric("admission_rejections_total", reason="queue_full") >= 4


def test_a_deadline_ends_the_request_and_frees_its_pages(server: Any, wire: Any, golden: Any) -> None:
    """30: X-Request-Timeout -> 504, whole and streamed; a gRPC deadline -> DEADLINE_EXCEEDED."""
    body = LONG | {"max_tokens": 4000}
    answer = server.post("/v1/completions", body, {"X-Request-Timeout": "0.5"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert answer.headers["x-should-retry"] == "false"
    streamed = server.streamed("/v1/completions", body, {"X-Request-Timeout": "1"})
    assert streamed["error"]["code"] == "deadline_exceeded" and streamed["choices"][0]["text"]
    with pytest.raises(grpc.RpcError) as failed:
        wire.stub.Generate(pb.GenerateRequest(text="Once"), timeout=0.5)
    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    server.until(lambda: server.metric("num_requests_running") <= 1, "only the golden stream runs")
    server.until(lambda: server.metric("open_requests") <= 1, "only the golden stream is open")
    for nonsense in ("0", "-1", "nan", "inf", "soon", "1e999"):
        answer = server.post("/v1/completions", LONG, {"X-Request-Timeout": nonsense})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Request-Timeout"), nonsense


def test_a_hopeless_request_is_shed_before_its_prefill(keyed: Any, golden_beside: Any) -> None:
    """30: whoever waits past its deadline costs no step."""
    begin = keyed.log_size()
    with golden_beside(keyed):
        running = keyed.events("/v1/completions", LONG | {"n": 7})
        next(running)
        before = keyed.metric("prompt_tokens_total")
        answer = keyed.post("/v1/completions", {"prompt": [100] * 700}, {"X-Request-Timeout": "0.7"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert keyed.metric("prompt_tokens_total") == before
        running.close()
    [record] = [r for r in keyed.records(begin) if r.get("prompt_tokens") == 700]
    assert record["generated_tokens"] == 0 and record["prefill_time"] is None


def test_while_it_loads_a_server_says_so(start_server: Callable[..., Any], wire_to: Callable[[Any], Any]) -> None:
    """31: 503 with Retry-After and the cause until it is ready; it lives all the while."""
    server = start_server(fixed_ports=True)

    def answers() -> bool:
        with suppress(httpx.TransportError):
            return bool(server.health("/health/live").status_code)
        return False

    server.until(answers, "its doors are open")
    ready = server.health()
    assert (
        ready.status_code == 503
        and ready.json()["cause"].startswith("the engine is ")
        and "retry-after" in ready.headers
    )
    assert server.health("/health/live").status_code == 200
    refusal = server.post("/v1/completions", {"prompt": "Hello"})
    assert (refusal.status_code, refusal.json()["error"]["code"]) == (503, "not_ready")
    assert int(refusal.headers["retry-after"]) >= 1
    wire_to(server).refused_grpc("not_ready", None, "UNAVAILABLE", text="Hello")
    server.wait_ready()
    assert server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 1}).status_code == 200


def test_only_when_restarts_fail_a_stream_ends_with_engine_dead(start_server: Callable[..., Any]) -> None:
    """34: after the last restart the stream gets an error event, and the server ends with code 1."""
    server = start_server()
    answers: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: answers.append(server.streamed("/v1/completions", LONG)))
    reader.start()
    server.until(lambda: server.metric("num_requests_running"), "the stream runs")
    killed: set[int] = set()
    while server.process.poll() is None:
        for core in server._children("server.core"):
            if core.pid not in killed:
                core.send_signal(signal.SIGKILL)
                killed.add(core.pid)
        time.sleep(0.05)
    reader.join()
    assert len(killed) == 4
    assert answers[0]["error"]["code"] == "engine_dead" and answers[0]["error"]["type"] == "server_error"
    assert answers[0]["choices"][0]["text"]
    assert server.wait() == 1
    [told] = [line for line in server.log.read_text().splitlines() if line.startswith("error: ")]
    assert "SIGKILL" in told


def test_numbers_that_break_fail_their_request_alone(
    launch: Callable[..., Any], wire_to: Callable[[Any], Any], golden_beside: Any, model_with_nan: tuple[Path, int]
) -> None:
    """35: NaN logits -> 500 numerical_error; pages that held NaN harm nobody who gets them next."""
    directory, poison = model_with_nan
    flags = ("--max-num-seqs=4", "--max-num-batched-tokens=64", "--num-pages=65", "--page-size=8", "--dtype=float32")
    server = launch(str(directory), *flags)
    clean = {
        "prompt": [5, 6, 7, 8],
        "temperature": 0,
        "max_tokens": 100,
        "ignore_eos": True,
        "logit_bias": {poison: -100},
    }
    expected = server.post("/v1/completions", clean).json()["choices"][0]["text"]
    with golden_beside(server, max_tokens=300, logit_bias={str(poison): -100}):
        for length in (3, 150, 20):
            answer = server.post("/v1/completions", {"prompt": [5] * length + [poison] + [5] * 3, "max_tokens": 4})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "numerical_error"), answer.text
            assert answer.headers["x-should-retry"] == "false"
        body = {"prompt": [5], "logit_bias": {str(poison): 100}, "max_tokens": 50, "temperature": 0}
        streamed = server.streamed("/v1/completions", body)  # the first token is fine, and breaks the next
        assert streamed["error"]["code"] == "numerical_error"
        wire_to(server).refused_grpc("numerical_error", None, "INTERNAL", token_ids=pb.TokenIds(ids=[5, poison]))
        with ThreadPoolExecutor() as pool:
            answers = [*pool.map(lambda _: server.post("/v1/completions", clean), range(12))]
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {expected}
    server.assert_idle()
    assert server.stop() == 0


@pytest.fixture
def model_with_nan(tiny_model: Path, tmp_path: Path) -> tuple[Path, int]:
    """(a model, a token whose embedding is not a number)"""
    from safetensors.numpy import load_file, save_file

    directory, token = tmp_path / "model-with-nan", 300
    shutil.copytree(tiny_model, directory)
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return directory, token


def test_a_model_that_cannot_be_read_ends_the_start_with_one_line(
    launch: Callable[..., Any], broken_models: dict[str, tuple[Path, str]]
) -> None:
    """36, 37: bad GGUF and safetensors, a shard outside the folder, a FIFO, pickled weights only: exit code 2."""
    with ExitStack() as stack:
        servers = {name: launch(str(path), fixed_ports=True) for name, (path, _) in broken_models.items()}
        for server in servers.values():
            stack.callback(server.kill)
        for name, server in servers.items():
            assert server.wait(120) == 2, (name, server.log_tail())
            lines = [line for line in server.log.read_text().splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and broken_models[name][1] in lines[0], (name, lines)
            assert "Traceback" not in server.log.read_text(), name


@pytest.fixture
def broken_models(tiny_model: Path, tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """name -> (a model nobody can serve, what the message must hold)"""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_model, tmp_path / name))

    weights = (tiny_model / "model.safetensors").read_bytes()
    garbage, short, lying = copy("garbage"), copy("short"), copy("lying")
    (garbage / "model.safetensors").write_bytes(os.urandom(4096))
    (short / "model.safetensors").write_bytes(weights[:-100])
    (lying / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + weights[8:])
    outside, pipe, pickled = copy("outside"), copy("pipe"), copy("pickled")
    (outside / "model.safetensors").rename(tmp_path / "stolen.safetensors")
    index = {"weight_map": {"model.norm.weight": "../stolen.safetensors"}}
    (outside / "model.safetensors.index.json").write_text(json.dumps(index))
    (pipe / "model.safetensors").unlink()
    os.mkfifo(pipe / "model.safetensors")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    gguf = tmp_path / "bad.gguf"
    gguf.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (2**60).to_bytes(8, "little") * 2)
    return {
        "garbage": (garbage, "model.safetensors"),
        "short": (short, "model.safetensors"),
        "lying": (lying, "model.safetensors"),
        "outside": (outside, "stolen.safetensors"),
        "pipe": (pipe, "model.safetensors"),
        "pickled": (pickled, "safetensors"),
        "gguf": (gguf, "bad.gguf"),
        "missing": (tmp_path / "nowhere", "nowhere"),
    }
