"""Throughput on the default model, SmolLM2-135M-Instruct, beside `transformers.generate` in the same run.

    python benchmarks/offline.py [--requests 1 8 32] [--repeats 2] [--peer-dtypes float32 bfloat16] [--json FILE]

For every number of requests, each of 128 prompt tokens of English, greedy, end-of-sequence ignored:

    prompt tokens/s   prompt tokens / seconds of a call that asks for 1 token each
    output tokens/s   output tokens / seconds of a call that asks for 128 tokens each, prompt included

Every figure is the median of --repeats. jaxserve gets the requests as one `LLM.generate` call, transformers as one
static batch; all prompts are equally long, so the static batch wastes nothing on padding. The engines take turns,
never at the same time, in one process.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import RESULTS, environment, save
from rich.console import Console
from rich.table import Table

import jaxserve
from jaxserve.loading.checkpoint import open_checkpoint
from jaxserve.loading.default_model import default_model_path

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 128
TEXT = Path(__file__).resolve().parents[1] / "LICENSE"

Run = Callable[[list[list[int]], int], list[list[int]]]  # (prompts, tokens to make for each) -> the tokens made


def english_prompts(llm: jaxserve.LLM, count: int) -> list[list[int]]:
    """`count` windows into a long English text that start at different tokens, so none is the prefix of another."""
    tokens = llm.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
    step = (len(tokens) - PROMPT_TOKENS) // count
    assert step > 0, f"{TEXT} is too short for {count} prompts"
    return [tokens[i * step : i * step + PROMPT_TOKENS] for i in range(count)]


def jaxserve_run(llm: jaxserve.LLM, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
    llm.reset_prefix_cache()
    params = jaxserve.SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    outputs = llm.generate(prompts, params, show_progress=False)
    return [output.outputs[0].token_ids for output in outputs]


def transformers_peer(dtype: str, threads: int) -> Run | None:
    """The same file through transformers and torch; None, with a line printed, where torch is not installed."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        print(f"transformers {dtype}: skipped, {error}")
        return None
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(str(default_model_path()))
    model = LlamaForCausalLM(LlamaConfig.from_dict(checkpoint.hf_config))
    state = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    model = model.to(getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=output_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return whole[:, ids.shape[1] :].tolist()

    return run


def seconds(run: Run, prompts: list[list[int]], output_tokens: int) -> float:
    start = time.perf_counter()
    made = run(prompts, output_tokens)
    taken = time.perf_counter() - start
    lengths = {len(tokens) for tokens in made}
    assert len(made) == len(prompts) and lengths == {output_tokens}, f"{len(made)} outputs of {lengths} tokens"
    return taken


def measure(engines: dict[tuple[str, str], Run], prompts: list[list[int]], repeats: int) -> list[dict[str, Any]]:
    """One row per engine for one number of requests; the engines take turns within every repeat."""
    first: dict[tuple[str, str], list[float]] = {name: [] for name in engines}
    whole: dict[tuple[str, str], list[float]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, run in engines.items():
            first[name].append(seconds(run, prompts, 1))
            whole[name].append(seconds(run, prompts, OUTPUT_TOKENS))
    rows: list[dict[str, Any]] = []
    for name in engines:
        rows.append(
            {
                "requests": len(prompts),
                "engine": name[0],
                "dtype": name[1],
                "prompt_tokens_per_s": round(len(prompts) * PROMPT_TOKENS / statistics.median(first[name]), 1),
                "output_tokens_per_s": round(len(prompts) * OUTPUT_TOKENS / statistics.median(whole[name]), 1),
                "first_token_seconds": [round(value, 3) for value in first[name]],
                "whole_seconds": [round(value, 3) for value in whole[name]],
            }
        )
    for row in rows[1:]:  # jaxserve is the first
        for kind in ("prompt", "output"):
            row[f"{kind}_ratio"] = round(rows[0][f"{kind}_tokens_per_s"] / row[f"{kind}_tokens_per_s"], 3)
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    shown = Table(title=title, title_justify="left")
    for name in ("requests", "engine", "dtype", "prompt tokens/s", "output tokens/s", "jaxserve: prompt", "output"):
        shown.add_column(name, justify="left" if name in ("engine", "dtype") else "right")
    for row in rows:
        ratios = [f"{row[key]:.2f}×" if key in row else "" for key in ("prompt_ratio", "output_ratio")]
        rates = [f"{row[key]:,.1f}" for key in ("prompt_tokens_per_s", "output_tokens_per_s")]
        shown.add_row(str(row["requests"]), row["engine"], row["dtype"], *rates, *ratios)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], help="concurrent requests")
    parser.add_argument("--repeats", type=int, default=2, help="runs to take the median of")
    parser.add_argument("--dtype", default="float32", help="jaxserve's dtype")
    parser.add_argument("--peer-dtypes", nargs="*", default=["float32"], help="torch dtypes to run transformers in")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads")
    parser.add_argument("--json", type=Path, default=RESULTS / "offline.json", help="file to write")
    args = parser.parse_args()
    if min(args.requests) < 1 or args.repeats < 1:
        parser.error("--requests and --repeats must be positive")
    sizes = {"max_num_seqs": max(args.requests), "max_model_len": PROMPT_TOKENS + OUTPUT_TOKENS}
    with jaxserve.LLM(dtype=args.dtype, show_progress=False, **sizes) as llm:
        engines: dict[tuple[str, str], Run] = {("jaxserve", args.dtype): functools.partial(jaxserve_run, llm)}
        for dtype in args.peer_dtypes:
            peer = transformers_peer(dtype, args.threads)
            if peer is not None:
                engines["transformers", dtype] = peer
        facts = environment()
        # Warms caches and allocators, and shows that all do the same work.
        warm = {name: run(english_prompts(llm, max(args.requests)), 4) for name, run in engines.items()}
        for (name, dtype), made in warm.items():
            assert dtype != args.dtype or made == warm["jaxserve", args.dtype], f"{name} makes other tokens"
        rows = []
        for requests in args.requests:
            rows += measure(engines, english_prompts(llm, requests), args.repeats)
            print(f"{requests} requests measured", flush=True)
    facts["load_average_end"] = round(os.getloadavg()[0], 2)
    settings = {
        "dtype": args.dtype,
        "model": default_model_path().name,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "repeats": args.repeats,
        "torch_threads": args.threads,
        **sizes,
    }
    Console(width=110).print(table(rows, f"SmolLM2-135M-Instruct · {facts['cpu']} · {facts['cores']} cores"))
    save({"benchmark": "offline", "environment": facts, "settings": settings, "rows": rows}, args.json)
    print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
