"""The GPU benchmarks without a GPU: what they count, write, choose and tell. `bench-dry-run` walks the rest."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from pallas_kernels import tuning

FOLDER = Path(__file__).parents[2] / "benchmarks"
FACTS = {"device": "NVIDIA H200", "driver": "580.1", "versions": {"jax": "0.11.2"}, "commit": "abc", "date": "today"}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """module(name): a module of benchmarks/; they import each other by bare names."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> Any:
        __import__(name)
        return sys.modules[name]

    return load


def weights(config: dict[str, Any]) -> int:
    """All of a Llama's parameters, from the shapes of its tensors."""
    hidden, kv = config["hidden_size"], config["num_key_value_heads"] * 128
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config["intermediate_size"] + 2 * hidden
    return config["num_hidden_layers"] * layer + hidden + 2 * config["vocab_size"] * hidden


@pytest.mark.parametrize(("name", "published"), [("Llama-2-13B", 13.016e9), ("Llama-3-8B", 8.030e9)])
def test_model_sizes_are_the_published_ones(module: Any, name: str, published: float) -> None:
    config = module("gpu.models").MODELS[name]
    assert weights(config) == pytest.approx(published, rel=1e-3)
    size = module("gpu.roofline").ModelSize.of(config)
    embeddings_and_norms = config["vocab_size"] * config["hidden_size"] + (
        (2 * config["num_hidden_layers"] + 1) * config["hidden_size"]
    )
    assert size.layer_weights + size.head_weights == weights(config) - embeddings_and_norms


def test_decode_step_reads_every_weight_once_and_every_rows_context(module: Any) -> None:
    roofline = module("gpu.roofline")
    size = roofline.ModelSize.of(module("gpu.models").MODELS["Llama-3-8B"])
    assert size.kv_bytes(2) == 128 * 1024
    work = roofline.decode_step(size, [2048] * 64, kv_item_bytes=2)
    assert work.bytes == 2 * (size.layer_weights + size.head_weights) + 64 * 2048 * 128 * 1024
    # A float8 pool halves the values and adds a scale for each token and head.
    assert size.kv_bytes(1) == 32 * 2 * 8 * (128 + 4)


@pytest.mark.parametrize("rows", [[(1, 7), (1, 1)], [(5, 5)], [(1, 9), (4, 6), (3, 3)]])
def test_masked_scores_are_not_counted(module: Any, rows: list[tuple[int, int]]) -> None:
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "kv_item_bytes": 2, "item_bytes": 2}
    seen = sum(position + 1 for count, context in rows for position in range(context - count, context))
    work = module("gpu.roofline").mixed_attention(rows, **heads)
    assert work.flops == 2 * 2 * seen * 4 * 8
    if all(count == 1 for count, _ in rows):
        assert work == module("gpu.roofline").decode_attention([context for _, context in rows], **heads)


def test_shares_are_of_the_measured_ceilings(module: Any) -> None:
    roofline = module("gpu.roofline")
    share = roofline.shares(roofline.Work(2 * 10**9, 10**12), 1000.0, roofline.Ceilings(4000.0, 2000.0))
    assert (share["gb_s"], share["tflop_s"]) == (2000.0, 1000.0)
    assert (share["copy_percent"], share["matmul_percent"], share["roofline_percent"]) == (50.0, 50.0, 50.0)


def test_rows_outlive_a_killed_run_and_the_later_one_counts(module: Any, tmp_path: Path) -> None:
    rows = module("gpu.rows")
    file = rows.RowFile(tmp_path / "new" / rows.NAME, FACTS)
    file.add("steps", "one", value=1)
    file.add("steps", "two", value=2)
    file.add("steps", "one", value=3)
    with file.path.open("a") as cut:
        cut.write('{"part": "steps", "na')
    read = rows.read([file.path])
    assert [(row["name"], row["value"]) for row in read] == [("one", 3), ("two", 2)]
    assert all(row["driver"] == "580.1" for row in read)


def test_row_names_machine_versions_flags_and_date(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_command_buffer=")
    facts = module("gpu.rows").machine()
    assert facts.keys() >= {"device", "driver", "versions", "xla_flags", "date", "commit"}
    assert facts["xla_flags"] == "--xla_gpu_enable_command_buffer=" and "jax" in facts["versions"]


def test_error_is_relative_and_nan_never_passes(module: Any) -> None:
    errors = module("gpu.timing").errors
    truth = jnp.array([3.0, 4.0])
    assert errors(truth + jnp.array([0.0, 0.5]), truth) == {"max_abs_error": 0.5, "rel_error": pytest.approx(0.1)}
    assert not errors(truth.at[0].set(jnp.nan), truth)["rel_error"] <= 1e9
    assert errors(jnp.array([1, 2, 3, 4]), jnp.array([1, 2, 3, 5]))["rel_error"] == 0.25


@dataclass(frozen=True)
class Config:
    block: int = 1


def test_tuner_forces_a_configuration_and_learns_its_key(module: Any) -> None:
    with module("gpu.case").choices(Config(7)) as made:
        assert tuning.choose("an_op", "", {"rows": 4}, Config()) == Config(7)
        assert tuning.choose("another", "", {}, "of another type") == "of another type"
    assert (made[0].op, made[0].key, made[0].config) == ("an_op", {"rows": 4}, Config(7))
    assert tuning.choose("an_op", "", {"rows": 4}, Config()) == Config()


def test_tuned_file_is_what_ops_look_up(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    path = tuning.path("A Card Of Its Own")
    for rows, block in ((4, 2), (8, 3), (4, 5)):
        module("kernels").store(path, tuning.row("an_op", {"rows": rows}, Config(block), median_us=1.0))
    assert len(json.loads(path.read_text())) == 2
    assert tuning.choose("an_op", "A Card Of Its Own", {"rows": 4}, Config()) == Config(5)
    assert tuning.choose("an_op", "A Card Of Its Own", {"rows": 16}, Config()) == Config(1)


def test_cases_are_told_apart_by_their_names(module: Any) -> None:
    all_cases = module("gpu.all_cases").all_cases
    everything = all_cases(tiny=False, quick=False)
    names = [(case.op, case.name) for case in everything]
    assert len(set(names)) == len(names)
    assert {(case.op, case.name) for case in all_cases(tiny=False, quick=True)} <= set(names)
    assert {case.op for case in everything} == {case.op for case in all_cases(tiny=True, quick=False)}


def test_kernel_of_every_case_has_candidates_or_a_reason(module: Any) -> None:
    for case in module("gpu.all_cases").all_cases(tiny=False, quick=False):
        for name in set(case.backends) - {"reference", "mosaic"}:
            backend = module("kernels").Backend(name, "NVIDIA H200", 132)
            assert case.unsupported(backend) or case.candidates(backend), f"{case.op} {case.name}"


def test_case_becomes_a_row_and_a_wrong_kernel_an_error(module: Any, tmp_path: Path) -> None:
    kernels, rows, roofline = module("kernels"), module("gpu.rows"), module("gpu.roofline")
    case = module("gpu.matmul_cases").plain_case(2, 8, 4, "float32")
    file = rows.RowFile(tmp_path / rows.NAME, FACTS)
    settings = kernels.Settings(3, 0.0, None, float("inf"), roofline.Ceilings(1.0, 1.0), file)
    backend = [kernels.Backend("reference")]
    assert kernels.run_case(case, backend, settings) == 0
    [row] = rows.read([file.path])
    assert row["rel_error"] < 1e-6 and row["median_us"] > 0 and row["bytes"] == 4 * (8 * 4 + 2 * 12)
    impossible = kernels.Case(**{**vars(case), "tolerance": -1.0})
    assert kernels.run_case(impossible, backend, settings) == 1
    [row] = rows.read([file.path])
    assert "error" in row and "median_us" not in row


def test_requests_are_the_same_for_every_engine(module: Any) -> None:
    workload = module("gpu.workload")
    jobs = workload.mixed_jobs(256, 32000, tiny=False)
    assert jobs == workload.mixed_jobs(256, 32000, tiny=False)
    assert all(32 <= len(job.prompt) <= 1024 and 32 <= job.output_tokens <= 512 for job in jobs)
    shared, apart = (workload.prefixed(jobs, 32000, shared=shared, tiny=False) for shared in (True, False))
    assert [len(job.prompt) for job in shared] == [len(job.prompt) for job in apart]
    assert len({tuple(job.prompt[:2048]) for job in shared}) == 1
    assert len({tuple(job.prompt[:16]) for job in apart}) == 256
    assert max(len(job.prompt) + job.output_tokens for job in shared) <= 4096


def comparison(**rates: float) -> list[dict[str, Any]]:
    return [
        {"part": "comparison", "name": name, "output_tokens_per_s": rate, "tokens_per_s": 2 * rate}
        for name, rate in rates.items()
    ]


def test_goals_say_by_how_much(module: Any) -> None:
    step = {"part": "steps", "label": "", "model": "Llama-3-8B", "median_us": 1.0}
    rows = [
        *comparison(a=10.0, d=450.0, e=900.0, d2=300.0),
        {**step, "kind": "decode", "rows": 64, "copy_percent": 90.0},
        {**step, "kind": "decode", "rows": 128, "copy_percent": 72.0},
        {**step, "kind": "decode", "rows": 8, "copy_percent": 10.0},
        {**step, "kind": "prefill", "tokens": 2048, "matmul_percent": 60.0},
    ]
    verdicts = {goal.name: goal.verdict for goal in module("gpu.tables").goals(rows)}
    assert verdicts["(d) over (a), output tokens/s"] == "met, 50% above"
    assert verdicts["(e) over (d2), output tokens/s"] == "met, 100% above"
    assert verdicts["decode step, 64 rows or more, Llama-3-8B: of the memory roofline"] == "missed by 10%"
    assert verdicts["prefill of 2,048 tokens, Llama-3-8B: of the matmul ceiling"] == "met, 20% above"
    assert verdicts["prefill of 2,048 tokens, Llama-2-13B: of the matmul ceiling"] == "not measured"


def test_readme_shows_rows_and_says_where_there_are_none(module: Any) -> None:
    report = module("report")
    marks = "\n".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in module("gpu.tables").TABLES)
    assert report.render_gpu(marks, []).count("No results yet.") == 4
    done = {"engine": "x", "requests": 4, "of_requests": 256, "prompt_tokens": 9, "output_tokens": 9, "seconds": 1.0}
    shown = report.render_gpu(marks, [FACTS | done | row for row in comparison(a=10.0, d=450.0)])
    assert "NVIDIA H200 · driver 580.1 · jax 0.11.2 · commit abc · today" in shown
    assert "| d | x | 4 | 256 |" in shown and "45.0×" in shown
    assert shown.count("No results yet.") == 2  # kernels and steps


def test_engine_options_take_numbers(module: Any) -> None:
    option = module("gpu_steps").option
    assert [option(text) for text in ("a=1", "b=0.5", "c=fp8")] == [("a", 1), ("b", 0.5), ("c", "fp8")]


def test_failing_part_fails_the_run_and_stops_no_other(tmp_path: Path) -> None:
    command = ["bash", str(FOLDER / "gpu.sh"), "--dry-run", "--only", "ceilings,compare", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": "false"}, timeout=60)
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines() if line.endswith("failed (1)")] == [
        "ceilings",
        "compare-jaxserve",
        "compare-transformers",
        "report",
    ]


def test_unknown_flag_shows_how_it_is_used() -> None:
    done = subprocess.run(["bash", str(FOLDER / "gpu.sh"), "--fast"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--dry-run" in done.stderr
