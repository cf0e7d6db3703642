"""A server under the workloads W1 to W4, beside the same engine without a server, in the same run.

    python benchmarks/serve.py --start                        # starts the server itself, with the default model
    python benchmarks/serve.py --url http://127.0.0.1:8000    # one that runs already
    python benchmarks/serve.py --start --workload w1,w2 --protocol rest,grpc --option max_num_seqs=16

For every workload and protocol, all repeats together unless said otherwise:

    TTFT, ITL         request sent to first text; gap between two pieces of text of a stream; as the client sees them
    output tokens/s   output tokens / seconds from the first request to the last byte; median of the repeats
    in-process        the same of `LLM.generate`, with the sizes and the dtype that the server says it runs with
    front end         CPU time of the front-end processes for an output token; core: CPU cores the engine kept busy

The client is a process of its own (serve_client.py), and so is the engine (serve_engine.py). On a CPU server and engine
take turns; on an accelerator, which holds only one of them, the server comes first. Every repeat starts them anew: a
process keeps the memory it got at its start, which makes it some percent faster or slower than the next.
"""

import argparse
import itertools
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import serve_prompts
from report import RESULTS, environment, save, serve_table
from rich.console import Console
from rich.markdown import Markdown
from serve_measure import ALONE, Measured, Outcome, Plan, measure
from serve_processes import Addresses
from serve_prompts import Workload

PACKAGES = ("jaxserve", "jax", "jaxlib", "numpy", "fastapi", "grpcio", "uvicorn")
PROTOCOLS = ("rest", "grpc")


def rows(works: Sequence[Workload], outcome: Outcome) -> list[dict[str, Any]]:
    """One per workload and protocol."""
    measured = outcome.measured
    return [
        row(work, protocol, measured[work.name, protocol], measured.get((work.name, ALONE)))
        for work in works
        for protocol in PROTOCOLS
        if (work.name, protocol) in measured
    ]


def row(work: Workload, protocol: str, served: Measured, alone: Measured | None) -> dict[str, Any]:
    rate = work.output_tokens / statistics.median(served.wall)
    made = work.output_tokens * len(served.wall)
    first = [stream["events"][0] - stream["started"] for stream in served.streams if stream["events"]]
    gaps = [b - a for stream in served.streams for a, b in itertools.pairwise(stream["events"])]
    told: dict[str, Any] = {
        "workload": work.name.upper(),
        "protocol": protocol,
        "requests": len(work.requests),
        "output_tokens": work.output_tokens,
        "ttft_p50_ms": milliseconds(first, 50),
        "ttft_p99_ms": milliseconds(first, 99),
        "itl_p50_ms": milliseconds(gaps, 50),
        "itl_p99_ms": milliseconds(gaps, 99),
        "tokens_per_s": round(rate, 1),
    }
    if alone is not None:
        alone_rate = work.output_tokens / statistics.median(alone.wall)
        told |= {"in_process_tokens_per_s": round(alone_rate, 1), "ratio": round(rate / alone_rate, 3)}
    for role, key in (("front end", "frontend"), ("all", "server"), ("client", "client")):
        if role in served.cpu:
            told[f"{key}_us_per_token"] = round(served.cpu[role] / made * 1e6, 1)
    if "core" in served.cpu:
        told["core_cores"] = round(served.cpu["core"] / sum(served.wall), 2)
    told["cached_prompt_tokens"] = sum(stream["cached_tokens"] for stream in served.streams) // len(served.wall)
    told["wall_s"] = [round(wall, 3) for wall in served.wall]
    told["in_process_wall_s"] = [] if alone is None else [round(wall, 3) for wall in alone.wall]
    return told


def milliseconds(values: Sequence[float], percent: int) -> float | None:
    """Percentile of seconds, in ms: the smallest value that so many percent of them do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    return round(1e3 * ordered[max(0, -(-len(ordered) * percent // 100) - 1)], 2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--start", action="store_true", help="start a server, on free ports, and stop it in the end")
    where.add_argument("--url", help="REST address of a server that runs")
    parser.add_argument("--grpc", help="its gRPC address [port 50051 of the same host]")
    parser.add_argument("--admin", default="http://127.0.0.1:8081", help="its admin address [%(default)s]")
    parser.add_argument("--model", help="of --start: directory, .gguf file or hub id; without it, the default model")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of --start: a setting")
    parser.add_argument("--workload", default=",".join(serve_prompts.NAMES), help="some of [%(default)s]")
    parser.add_argument("--protocol", default="rest", help="some of rest,grpc [%(default)s]")
    parser.add_argument("--repeats", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--no-in-process", action="store_true", help="measure the server only")
    parser.add_argument("--at-least", type=float, metavar="RATIO", help="fail where served/in-process is below")
    parser.add_argument("--quick", action="store_true", help="an eighth of everything: does it run at all?")
    parser.add_argument("--json", type=Path, help="file to write [results/serve_PLATFORM.json; of --quick none]")
    args = parser.parse_args()
    args.workload, args.protocol = args.workload.split(","), args.protocol.split(",")
    for given, known in ((args.workload, serve_prompts.NAMES), (args.protocol, PROTOCOLS)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be positive")
    if not args.start and (args.model or args.option):
        parser.error("--model and --option go with --start: a server that runs has its own")
    if args.at_least is not None and args.no_in_process:
        parser.error("--at-least compares with what --no-in-process leaves out")
    if any("=" not in option for option in args.option):
        parser.error("--option takes NAME=VALUE")
    return args


def plan_of(args: argparse.Namespace) -> Plan:
    addresses = None
    if args.url is not None:
        grpc = args.grpc or f"{urlsplit(args.url).hostname}:50051"
        addresses = Addresses(rest=args.url.rstrip("/"), grpc=grpc, admin=args.admin.rstrip("/"))
    return Plan(
        addresses=addresses,
        model=args.model,
        options=dict(option.split("=", 1) for option in args.option),
        works=[serve_prompts.workload(name, quick=args.quick) for name in args.workload],
        protocols=args.protocol,
        repeats=args.repeats,
        alone=not args.no_in_process,
    )


def main() -> None:
    args = parse()
    plan = plan_of(args)
    load = round(os.getloadavg()[0], 2)
    outcome = measure(plan)
    info = outcome.status["info"]
    facts = environment(device=info["device"], packages=PACKAGES)
    facts |= {"load_average": load, "load_average_end": facts["load_average"]}
    settings = {"dtype": info["dtype"], "model": outcome.status["models"][0], "repeats": args.repeats}
    result = {
        "benchmark": "serve",
        "environment": facts,
        "settings": settings | info["limits"] | {"options": dict(plan.options)},
        "memory_mib": outcome.memory_mib,
        "rows": rows(plan.works, outcome),
    }
    Console(width=160).print(Markdown(serve_table(result)))
    path = args.json or (None if args.quick else RESULTS / f"serve_{info['platform']}.json")
    if path is not None:
        save(result, path)
        print(f"wrote {path}")
    low = [row for row in result["rows"] if args.at_least is not None and row["ratio"] < args.at_least]
    if low:
        told = ", ".join(f"{row['workload']} {row['protocol']} {row['ratio']}" for row in low)
        raise SystemExit(f"below {args.at_least} of the in-process engine: {told}")


if __name__ == "__main__":
    main()
