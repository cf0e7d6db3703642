"""benchmarks/serve.py: its prompts and figures by themselves, and all of it against a server with a tiny model."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
QUICK = {"W1": (2, 32), "W2": (4, 64), "W3": (8, 155), "W4": (4, 16)}  # requests, output tokens


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """module(name): a script of benchmarks/; they import each other by bare names."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return __import__(name)

    return load


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["w1", "w2", "w3", "w4"])
def test_prompts_have_the_lengths_and_share_the_prefix_their_workload_names(
    module: Any, name: str, quick: bool
) -> None:
    prompts = module("serve_prompts")
    work = prompts.workload(name, quick=quick)
    made = prompts.prompts(work, range(2000))
    assert [len(prompt) for prompt in made] == [length for length, _ in work.requests]
    assert made == prompts.prompts(work, range(2000))
    shared = work.shared_prefix
    assert len({tuple(prompt[:shared]) for prompt in made}) == 1
    assert len({prompt[shared] for prompt in made}) == len(made)


def test_workloads_are_what_their_names_stand_for(module: Any) -> None:
    work = {name: module("serve_prompts").workload(name) for name in ("w1", "w2", "w3", "w4")}
    assert work["w1"].requests == ((128, 128),) * 4 and work["w1"].sequential
    assert work["w2"].requests == ((128, 128),) * 32
    assert work["w4"].requests == ((1056, 32),) * 32 and work["w4"].shared_prefix == 1024
    mixed = work["w3"].requests
    assert len(mixed) == 64 and all(32 <= prompt <= 512 and 16 <= output <= 256 for prompt, output in mixed)


def test_percentiles_are_values_that_were_measured(module: Any) -> None:
    milliseconds = module("serve").milliseconds
    hundred = [n / 1000 for n in range(100, 0, -1)]
    assert (milliseconds(hundred, 50), milliseconds(hundred, 99), milliseconds(hundred, 100)) == (50.0, 99.0, 100.0)
    assert milliseconds([0.002], 99) == 2.0
    assert milliseconds([], 50) is None


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_stream_is_read_alike_however_its_bytes_come(module: Any, size: int) -> None:
    job = {"host": "127.0.0.1", "port": 1, "model": "m", "cache_salt": "s"}
    stream = module("serve_client").RestStream(job, {"prompt": [1, 2], "max_tokens": 3})
    usage = {"completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}
    chunks: list[dict[str, Any]] = [{"choices": [{"text": text}], "usage": None} for text in ("a", "", "b")]
    chunks.append({"choices": [], "usage": usage})
    parts = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks] + [b"data: [DONE]\n\n"]
    parts.insert(1, b": keep-alive\n\n")
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    sent = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body
    stream.arrived = [(float(start), sent[start : start + size]) for start in range(0, len(sent), size)]
    report = stream.report()
    assert (report["output_tokens"], report["cached_tokens"], len(report["events"])) == (3, 1, 2)
    assert sorted(report["events"]) == report["events"]


def test_stream_that_ends_early_is_no_result(module: Any) -> None:
    job = {"host": "127.0.0.1", "port": 1, "model": "m", "cache_salt": "s"}
    stream = module("serve_client").RestStream(job, {"prompt": [1], "max_tokens": 3})
    part = b'data: {"choices": [{"text": "a"}], "usage": null}\n\n'
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    stream.arrived = [(0.0, head + b"%x\r\n%s\r\n" % (len(part), part))]
    with pytest.raises(SystemExit, match="before its last message"):
        stream.report()


@pytest.mark.serving
def test_quick_run_measures_every_workload_over_both_protocols(
    tiny_model: Path, xla_cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "serve.json"
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_pages": 257, "page_size": 8, "dtype": "float32"}
    options = sizes | {"max_model_len": 256, "compilation_cache_dir": xla_cache}
    command = [sys.executable, str(FOLDER / "serve.py"), "--start", "--quick", "--repeats", "1", "--json", str(path)]
    command += ["--protocol", "rest,grpc", "--model", str(tiny_model)]
    command += [part for name, value in options.items() for part in ("--option", f"{name}={value}")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert result["memory_mib"].keys() == {"supervisor", "core", "front end"}
    assert all(0 < size["now"] <= size["peak"] for size in result["memory_mib"].values())
    measured = {(row["workload"], row["protocol"]): row for row in result["rows"]}
    assert measured.keys() == {(name, protocol) for name in QUICK for protocol in ("rest", "grpc")}
    for (name, _), row in measured.items():
        assert (row["requests"], row["output_tokens"]) == QUICK[name]
        assert 0 < row["ttft_p50_ms"] <= row["ttft_p99_ms"]
        assert 0 <= row["itl_p50_ms"] <= row["itl_p99_ms"]
        assert row["tokens_per_s"] > 0 and row["in_process_tokens_per_s"] > 0
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / row["in_process_tokens_per_s"], rel=0.01)
        assert row["frontend_us_per_token"] > 0 and row["core_cores"] > 0
        assert row["cached_prompt_tokens"] == 0 or name == "W4"
    assert max(row["cached_prompt_tokens"] for (name, _), row in measured.items() if name == "W4") > 0
