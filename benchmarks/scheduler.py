"""Host time of scheduling: microseconds of plan + update per decode step, by context length and by queue length.

    python benchmarks/scheduler.py [--rows 64] [--steps 200] [--contexts 1024 8192 131072] [--waiting 16 256 4096]

In: sizes. Out: a table, then one line of JSON (or a file, with --output). Needs no accelerator and does not import JAX.
The first table holds `rows` sequences of each context, a step launched ahead of the last collected, prefix caching on.
In the second all slots are taken, or one is free but the pool is full, while that many requests wait.
"""

import argparse
import json
import platform
import statistics
import time
from collections import deque
from pathlib import Path

from jaxserve.request import Request, SamplingParams
from jaxserve.scheduling.plan import StepPlan, StepResult
from jaxserve.scheduling.scheduler import Scheduler

PAGE_SIZE = 16


def request(name: str, prompt: list[int]) -> Request:
    return Request(id=name, prompt_token_ids=prompt, params=SamplingParams(max_tokens=None), eos_token_ids=(0,))


def filled_scheduler(rows: int, context: int, steps: int, free_slots: int) -> tuple[Scheduler, list[float]]:
    """A scheduler with `rows` decoding sequences of `context` tokens of their own; and the us of their prefill."""
    prompt = list(range(1, context + 1))
    pages_each = -(-(context + steps + 8) // PAGE_SIZE)
    scheduler = Scheduler(
        num_pages=rows * pages_each + 1,
        page_size=PAGE_SIZE,
        max_num_seqs=rows + free_slots,
        max_num_batched_tokens=rows * context + free_slots,
        max_model_len=context + steps + 8,
    )
    for i in range(rows):
        scheduler.add(request(f"running{i}", [context + 1 + i, *prompt[1:]]))
    return scheduler, run_steps(scheduler, 1)


def run_steps(scheduler: Scheduler, steps: int) -> list[float]:
    """Microseconds of plan + update of each step; the update is that of the step before."""
    launched: deque[StepPlan] = deque()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        plan = scheduler.plan(0.0)
        assert plan is not None
        launched.append(plan)
        if len(launched) > 1:
            collect(scheduler, launched)
        times.append((time.perf_counter() - start) * 1e6)
    while launched:
        collect(scheduler, launched)
    return times


def collect(scheduler: Scheduler, launched: deque[StepPlan]) -> None:
    plan = launched.popleft()
    scheduler.update(plan, StepResult([1] * len(plan.rows)))


def measured(times: list[float], **what: object) -> dict[str, object]:
    return {**what, "median_us": round(statistics.median(times), 1), "max_us": round(max(times), 1)}


def by_context(rows: int, steps: int, contexts: list[int]) -> list[dict[str, object]]:
    results = []
    for context in contexts:
        scheduler, first = filled_scheduler(rows, context, steps, free_slots=0)
        results.append(measured(run_steps(scheduler, steps), context=context, prefill_us=round(first[0], 1)))
    return results


def by_queue(rows: int, steps: int, queue_lengths: list[int]) -> list[dict[str, object]]:
    results = []
    for why, free_slots in (("no slot", 0), ("no pages", 1)):
        for waiting in queue_lengths:
            scheduler, _ = filled_scheduler(rows, 1024, steps, free_slots)
            for i in range(waiting):
                scheduler.add(request(f"waiting{i}", [i + 5000] * 1024))
            results.append(measured(run_steps(scheduler, steps), waiting=waiting, because=why))
            assert scheduler.num_waiting == waiting and scheduler.num_running == rows
    return results


def table(results: list[dict[str, object]]) -> str:
    lines = [list(results[0]), *([str(value) for value in result.values()] for result in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="decoding sequences")
    parser.add_argument("--steps", type=int, default=200, help="decode steps to time")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768, 131072], help="tokens each")
    parser.add_argument("--waiting", type=int, nargs="+", default=[16, 256, 4096], help="queue lengths")
    parser.add_argument("--output", type=Path, help="write the JSON to this file")
    args = parser.parse_args()
    contexts = by_context(args.rows, args.steps, args.contexts)
    queues = by_queue(args.rows, args.steps, args.waiting)
    print(f"plan + update of {args.rows} decode rows, {args.steps} steps, pages of {PAGE_SIZE} tokens, microseconds\n")
    print(f"{table(contexts)}\n\n{table(queues)}\n")
    report = json.dumps(
        {
            "benchmark": "scheduler",
            "machine": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "rows": args.rows,
            "steps": args.steps,
            "page_size": PAGE_SIZE,
            "by_context": contexts,
            "by_queue": queues,
        }
    )
    if args.output:
        args.output.write_text(report + "\n")
    else:
        print(report)


if __name__ == "__main__":
    main()
