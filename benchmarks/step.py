"""Host time of a decode step, by what it goes into, at several batch sizes.

    python benchmarks/step.py [--rows 1 32 256] [--steps 200] [--overlap 1] [--json FILE]

A tiny random model keeps the device out of the way: what is left is the engine. The core is stepped directly, without
its thread and without text. Greedy requests, all of them decoding; medians over the steps after a warm-up.

    plan      the scheduler chooses the rows of the next step
    update    the scheduler takes in the tokens of a finished step
    pack      the plan becomes one packed array
    launch    arrays go to the device and the step is queued
    collect   what came back becomes Python values
    other     what is left of step(): output lists, counters
    wait      blocked until the device has the tokens (no host work)
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from report import RESULTS, environment, save
from rich.console import Console
from rich.table import Table

from jaxserve.config import EngineConfig
from jaxserve.engine.build import prepare, start_core
from jaxserve.engine.core import EngineCore
from jaxserve.request import Request, SamplingParams

PARTS = ("plan", "update", "pack", "launch", "collect", "other")
WARM_UP = 20
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def tiny_core(max_rows: int, context: int, overlap: int) -> EngineCore:
    """A started core of the tiny model with a slot and the pages for `max_rows` sequences of `context` tokens."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(MODEL))
        config = EngineConfig.from_options(
            model=directory,
            load_format="dummy",
            dtype="float32",
            max_num_seqs=max_rows,
            max_num_batched_tokens=max_rows,
            max_model_len=context,
            num_pages=max_rows * -(-context // 16) + 1,
            max_logprobs=1,
            overlap=overlap,
            show_progress=False,
        )
        core, _ = start_core(config, prepare(config))
    return core


def clock(core: EngineCore) -> dict[str, float]:
    """Seconds so far, by part."""
    counters, times = core.counters, core.runner.times
    return {
        "plan": counters.plan_seconds,
        "update": counters.update_seconds,
        "pack": times.pack,
        "launch": times.launch,
        "collect": times.collect,
        "wait": times.wait,
    }


def measure(core: EngineCore, rows: int, steps: int) -> dict[str, Any]:
    """Medians over `steps` decode steps of `rows` rows, in microseconds."""
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    names = [f"{rows}-{i}" for i in range(rows)]
    for i, name in enumerate(names):  # prompts of one token: all rows decode from the first step on
        core.add(Request(id=name, prompt_token_ids=[i % MODEL["vocab_size"]], params=params))
    for _ in range(WARM_UP):
        core.step()
    samples: dict[str, list[float]] = {name: [] for name in (*PARTS, "wait", "host", "step")}
    counted = core.counters.rows
    before = clock(core)
    for _ in range(steps):
        start = time.perf_counter()
        core.step()
        taken = time.perf_counter() - start
        after = clock(core)
        spent = {name: after[name] - before[name] for name in after}
        spent["other"] = taken - sum(spent.values())
        spent["host"], spent["step"] = taken - spent["wait"], taken
        for name, seconds in spent.items():
            samples[name].append(seconds * 1e6)
        before = after
    assert core.counters.rows - counted == rows * steps, "a measured step was not a decode step of all rows"
    for name in names:
        core.abort(name)
    while core.has_work:
        core.step()
    medians = {f"{name}_us": round(statistics.median(values), 1) for name, values in samples.items()}
    return {"rows": rows, **medians, "host_us_per_row": round(medians["host_us"] / rows, 1)}


def table(results: list[dict[str, Any]], title: str) -> Table:
    shown = Table(title=title, title_justify="left")
    for name in ("rows", *PARTS, "host", "wait", "step"):
        shown.add_column(name, justify="right", style="bold" if name == "host" else None)
    for result in results:
        values = [f"{result[f'{name}_us']:,.1f}" for name in (*PARTS, "host", "wait", "step")]
        shown.add_row(str(result["rows"]), *values)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256], help="decoding rows a step")
    parser.add_argument("--steps", type=int, default=200, help="steps to take the median of, at each size")
    parser.add_argument("--overlap", type=int, choices=(0, 1), default=1, help="the engine's setting")
    parser.add_argument("--json", type=Path, default=RESULTS / "step.json", help="file to write")
    args = parser.parse_args()
    if min(args.rows) < 1 or args.steps < 1:
        parser.error("--rows and --steps must be positive")
    context = WARM_UP + args.steps + 8
    facts = environment()
    core = tiny_core(max(args.rows), context, args.overlap)
    passes = [[measure(core, rows, args.steps) for rows in args.rows] for _ in range(2)]
    results = passes[-1]  # the first pass warms caches and the allocator
    title = f"host µs per decode step · {facts['cpu']} · jax {facts['versions']['jax']} · overlap {args.overlap}"
    Console(width=110).print(table(results, title))
    settings = {"dtype": "float32", "model": MODEL, "steps": args.steps, "overlap": args.overlap}
    result = {"benchmark": "step", "environment": facts, "settings": settings, "rows": results}
    save(result, args.json)
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
