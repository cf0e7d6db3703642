"""The engine's own steps on a GPU: time, tokens a second and share of the roofline, with random weights of real sizes.

    python benchmarks/gpu_steps.py --model Llama-3-8B [--rows 1 8 ...] [--contexts 512 2048 8192] [--out DIR]
                                   [--prefill 512 2048 8192] [--option NAME=VALUE ...] [--label TEXT] [--tiny]

decode    medians over steps in which all rows decode greedily, the next step launched before this one's tokens are
          read, as the engine does. For a context the rows are filled with prompts of their own and measured, and then
          fewer and fewer of them. What does not fit the pool is said to. Bytes: the weights read once, and every row's
          keys and values; operations: of the rows that are there.
host      what the engine spends on a step besides waiting for the device
prefill   one prompt in one step, from its arrival to its first token; medians over prompts
sampled   a decode step whose rows draw from a nucleus, at the middle context

Only the step programs that are needed are compiled. --label: of rows measured under other XLA_FLAGS or options.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ceilings import known
from gpu import rows
from gpu.models import MODELS, write_model
from gpu.roofline import Ceilings, ModelSize, decode_step, prefill_step, shares
from report import RESULTS

from jaxserve.config import CacheOptions, EngineConfig
from jaxserve.engine.build import Prepared, prepare, start_core
from jaxserve.engine.core import EngineCore
from jaxserve.request import Request, SamplingParams
from jaxserve.runner.device import open_device
from jaxserve.shapes import StepShape

PART = "steps"
WARM_UP = 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
NUCLEUS = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=None, ignore_eos=True, seed=1)


@dataclass(frozen=True)
class Plan:
    """What to measure, of which model."""

    model: str
    rows: Sequence[int]
    contexts: Sequence[int]
    prefill: Sequence[int]
    steps: int
    label: str
    sampled_rows: Sequence[int]

    @property
    def room(self) -> int:
        """Tokens a sequence can have: a context, and what it grows by while fewer and fewer rows are measured."""
        return max([*self.contexts, *self.prefill]) + 2 * (len(self.rows) + 2) * (self.steps + WARM_UP) + 256


class Meter:
    """A started engine whose sequences' lengths are followed, and the rows of one model."""

    def __init__(self, core: EngineCore, prepared: Prepared, plan: Plan, ceilings: Ceilings, file: rows.RowFile):
        self.core = core
        self.plan = plan
        self.ceilings = ceilings
        self.size = ModelSize.of(MODELS[plan.model])
        self.kv_item_bytes = np.dtype(prepared.dimensions.kv_dtype).itemsize
        self.item_bytes = np.dtype(prepared.dimensions.dtype).itemsize
        self.budget = prepared.max_num_batched_tokens
        self.pool_tokens = prepared.plan.pool_tokens
        self.facts = {
            "model": plan.model,
            "label": plan.label,
            "dtype": prepared.dimensions.dtype,
            "kv_dtype": prepared.dimensions.kv_dtype,
            "backends": dict(prepared.dimensions.kernels.backends),
        }
        self._file = file
        self._random = np.random.default_rng(0)
        self._lengths: dict[str, int] = {}  # of running sequences, as far as their tokens were read
        self._made = 0

    def add(self, length: int, params: SamplingParams) -> str:
        """A request with a prompt that shares nothing with any other."""
        self._made += 1
        name = f"request {self._made}"
        prompt = self._random.integers(0, self.size.vocab_size, length).tolist()
        self.core.add(Request(id=name, prompt_token_ids=prompt, params=params))
        self._lengths[name] = length
        return name

    def step(self) -> int:
        """One step of the engine; returns how many tokens came out."""
        count = 0
        for output in self.core.step():
            count += len(output.token_ids)
            if output.request_id in self._lengths:
                self._lengths[output.request_id] += len(output.token_ids)
        return count

    def drop(self, names: Sequence[str]) -> None:
        for name in names:
            self.core.abort(name)
            del self._lengths[name]

    def drain(self) -> None:
        """Ends everything."""
        self.drop(list(self._lengths))
        while self.core.has_work:
            self.core.step()

    def row(self, name: str, **values: Any) -> None:
        self._file.add(PART, ", ".join(filter(None, (self.plan.model, name, self.plan.label))), **self.facts, **values)

    def decode(self, name: str, context: int) -> None:
        """A row about the decode steps of the sequences that run now."""
        count = len(self._lengths)
        for _ in range(WARM_UP):
            self.step()
        before, samples, hosts = self.spent(), [], []
        lengths = []
        for _ in range(self.plan.steps):
            lengths.append(sum(self._lengths.values()))
            start = time.perf_counter()
            made = self.step()
            taken = time.perf_counter() - start
            assert made == count, f"{made} tokens came out of a decode step of {count} rows"
            after = self.spent()
            samples.append(taken * 1e6)
            hosts.append((taken - (after - before)) * 1e6)
            before = after
        median, p10, p90 = (float(np.percentile(samples, share)) for share in (50, 10, 90))
        # Each step also reads the token whose result is not read yet.
        contexts = [round(statistics.mean(lengths) / count) + 1] * count
        work = decode_step(self.size, contexts, kv_item_bytes=self.kv_item_bytes, item_bytes=self.item_bytes)
        self.row(
            name,
            kind="decode",
            rows=count,
            context=context,
            median_us=round(median, 1),
            p10_us=round(p10, 1),
            p90_us=round(p90, 1),
            samples=len(samples),
            tokens_per_s=round(count / median * 1e6, 1),
            host_us=round(statistics.median(hosts), 1),
            **asdict(work),
            **shares(work, median, self.ceilings),
        )

    def spent(self) -> float:
        """Seconds that the engine was blocked on the device, so far."""
        return self.core.runner.times.wait

    def growth(self, count: int, context: int) -> int:
        """Tokens a row may have made by the time its steps are measured; those in its last page."""
        return 2 * (count * context // self.budget + 1) + WARM_UP + self.plan.steps + 16

    def measure_decode(self, context: int) -> None:
        """All row counts at one context, most rows first."""
        wanted = sorted(self.plan.rows, reverse=True)
        fits = [count for count in wanted if count * (context + self.growth(count, context)) <= self.pool_tokens]
        for count in wanted:
            if count not in fits:
                self.row(
                    f"decode {count} x {context}",
                    kind="decode",
                    rows=count,
                    context=context,
                    skipped=f"the pool holds {self.pool_tokens:,} tokens",
                )
        if not fits:
            return
        names = [self.add(context, GREEDY) for _ in range(fits[0])]
        waiting = set(names)
        while waiting:  # until every prompt is computed
            self.step()
            waiting = {name for name in waiting if self._lengths[name] == context}
        for count in fits:
            self.drop(names[count:])
            names = names[:count]
            self.step()  # the one that was launched with the rows just dropped
            self.decode(f"decode {count} x {context}", context)
        self.drain()

    def measure_sampled(self, count: int, context: int) -> None:
        names = [self.add(context, NUCLEUS) for _ in range(count)]
        while any(self._lengths[name] == context for name in names):
            self.step()
        self.decode(f"sampled {count} x {context}", context)
        self.drain()

    def measure_prefill(self, tokens: int, repeats: int) -> None:
        """A row about prompts of so many tokens, one at a time."""
        samples = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            self.add(tokens, replace(GREEDY, max_tokens=1))
            while self.core.has_work:
                self.step()
            samples.append((time.perf_counter() - start) * 1e6)
            self._lengths.clear()
        samples = samples[2:]
        median = statistics.median(samples)
        work = prefill_step(self.size, tokens, item_bytes=self.item_bytes)
        self.row(
            f"prefill {tokens}",
            kind="prefill",
            tokens=tokens,
            median_us=round(median, 1),
            p10_us=round(float(np.percentile(samples, 10)), 1),
            p90_us=round(float(np.percentile(samples, 90)), 1),
            samples=len(samples),
            tokens_per_s=round(tokens / median * 1e6, 1),
            **asdict(work),
            **shares(work, median, self.ceilings),
        )


def started(plan: Plan, directory: Path, options: dict[str, Any]) -> tuple[EngineCore, Prepared, dict[str, float]]:
    """The engine with the step programs that the plan needs and no others; and the seconds of its start."""
    write_model(directory, plan.model, max(plan.room, MODELS[plan.model]["max_position_embeddings"]))
    config = EngineConfig.from_options(
        model=str(directory),
        load_format="dummy",
        max_num_seqs=max(plan.rows),
        max_model_len=plan.room,
        show_progress=False,
        **options,
    )
    prepared = prepare(config)
    prepared = replace(prepared, ladder=list(dict.fromkeys(needed(prepared, plan))))
    core, times = start_core(config, prepared)
    return core, prepared, asdict(times)


def needed(prepared: Prepared, plan: Plan) -> Iterator[StepShape]:
    """The smallest shape of the ladder for every row count and prompt, and the largest, which holds everything."""
    *shapes, largest = prepared.ladder
    least = [shape for shape in shapes if shape.sampler == shapes[0].sampler]  # nobody asks for log probabilities
    for wanted, kind in (((1, *plan.rows), True), (plan.prefill, False)):
        for tokens in sorted(set(wanted)):
            fitting = [shape for shape in least if shape.decode == kind and shape.tokens >= tokens]
            yield from fitting[:1]
    yield largest


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, with a number where it is one."""
    name, _, value = text.partition("=")
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return name, number(value)
    return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS], default="Llama-3-8B")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 512, 8192])
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 512, 8192])
    parser.add_argument("--steps", type=int, default=30, help="to take the median of")
    parser.add_argument("--option", type=option, action="append", default=[], help="of the engine, NAME=VALUE")
    parser.add_argument("--label", default="", help="of the rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder of rows")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to walk the code on a CPU")
    args = parser.parse_args()
    if args.tiny:
        args.model, args.rows, args.contexts, args.prefill, args.steps = "tiny", [1, 2], [24, 40], [24], 3
        args.option += [("max_num_batched_tokens", 32), ("num_pages", 65), ("dtype", "float32")]
    sampled = [] if args.label else [max(count for count in args.rows if count <= 64)]
    plan = Plan(args.model, args.rows, args.contexts, args.prefill, args.steps, args.label, sampled)
    options = dict(args.option)
    open_device(options.get("memory_utilization", CacheOptions.memory_utilization))
    ceilings = known(args.out, tiny=args.tiny)  # before the engine takes the memory
    with tempfile.TemporaryDirectory() as directory:
        core, prepared, times = started(plan, Path(directory), options)
    meter = Meter(core, prepared, plan, ceilings, rows.open_rows(args.out))
    meter.row("start", kind="start", seconds=times, programs=len(prepared.ladder), **memory(prepared))
    for tokens in args.prefill:
        meter.measure_prefill(tokens, 3 if args.tiny else 10)
    for context in args.contexts:
        meter.measure_decode(context)
    for count in plan.sampled_rows:
        meter.measure_sampled(count, sorted(args.contexts)[len(args.contexts) // 2])
    meter.row("memory", kind="memory", **memory(prepared))


def memory(prepared: Prepared) -> dict[str, int | None]:
    """Bytes: planned, and at their highest so far."""
    stats = prepared.device.memory_stats() or {}
    plan = prepared.plan
    return {
        "weight_bytes": plan.weight_bytes,
        "pool_bytes": plan.pool_bytes,
        "step_bytes": plan.step_bytes,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "limit_bytes": stats.get("bytes_limit"),
    }


if __name__ == "__main__":
    main()
