"""Every kernel at the shapes that matter: correct, how fast, what share of the card's ceilings; and how to launch it.

    python benchmarks/kernels.py [--out DIR] [--only OP,...] [--budget SECONDS] [--tune] [--tiny]

A case is an op at one shape (gpu/*_cases.py), run by each of its backends. A row holds the error against the reference
in float32, the median, p10 and p90 of a call, its bytes and operations as shares of the measured ceilings, and the
seconds it took to compile. With --tune a case's candidates are measured instead: one that is wrong is passed over, and
the fastest is written to pallas_kernels/tuned/. Cases come in order of what they tell; those that the budget leaves no
time for are named.

--tiny: small shapes and interpreted kernels, for machines without a GPU; tuned configurations then stay in DIR.
"""

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from ceilings import known
from gpu import rows, timing
from gpu.all_cases import all_cases
from gpu.case import Case, Choice, Problem, choices
from gpu.roofline import Ceilings, shares
from report import RESULTS

from jaxserve.runner.device import dispatch_target
from pallas_kernels import tuning
from pallas_kernels.backend import Backend

PART = "kernels"
COMPILE_THREADS = 8


@dataclass(frozen=True)
class Settings:
    """How long to measure, and where to."""

    samples: int
    sample_seconds: float
    candidates: int | None  # of a case, to try at most
    deadline: float  # time.perf_counter() after which no more is begun
    ceilings: Ceilings
    file: rows.RowFile


@dataclass(frozen=True)
class Attempt:
    """A case traced for one backend and configuration."""

    choice: Choice | None  # what the op looked up; None if nothing
    chain: Any  # lowered
    result: Any  # lowered
    seconds: float  # to trace

    def compiled(self) -> tuple[Any, Any, float]:
        """(chain, one call, seconds to trace and compile the chain)."""
        start = time.perf_counter()
        chain = self.chain.compile()
        seconds = self.seconds + time.perf_counter() - start
        return chain, self.result.compile(), round(seconds, 3)


def trace(problem: Problem, state: Any, backend: Backend, config: Any = None) -> Attempt:
    """config: instead of what the op chooses itself."""
    start = time.perf_counter()
    donate = (0,) if problem.donated else ()
    with choices(config) as made:
        chain = jax.jit(lambda state, data: problem.chain(backend, state, data), donate_argnums=donate)
        lowered = chain.lower(state, problem.data)
        seconds = time.perf_counter() - start
        result = jax.jit(lambda data: problem.result(backend, data)).lower(problem.data)
    looked_up = [choice for choice in made if config is None or choice.config == config]
    return Attempt(looked_up[-1] if looked_up else None, lowered, result, seconds)


def measured(
    case: Case, problem: Problem, programs: tuple[Any, Any, float], truth: Any, settings: Settings
) -> rows.Row:
    """The figures of one attempt; "error" among them if its result is wrong, and then no times."""
    chain, result, compile_seconds = programs
    figures: rows.Row = {**timing.errors(result(problem.data), truth), "compile_seconds": compile_seconds}
    if not figures["rel_error"] <= case.tolerance:  # nor is NaN
        return figures | {"error": f"result is off by {figures['rel_error']:.1e}, {case.tolerance:.0e} is allowed"}
    timed, _ = timing.measure(
        lambda state: chain(state, problem.data),
        problem.state(),
        calls=problem.calls,
        samples=settings.samples,
        sample_seconds=settings.sample_seconds,
    )
    return {
        **figures,
        **asdict(timed),
        **asdict(problem.work),
        **shares(problem.work, timed.median_us, settings.ceilings),
        "calls_in_chain": problem.calls,
        "working_set_bytes": problem.calls * problem.work.bytes,
    }


def run_case(case: Case, backends: Sequence[Backend], settings: Settings) -> int:
    """Measures a case on its backends; returns how many of them failed."""
    problem = case.build()
    truth = jax.block_until_ready(jax.jit(problem.truth)(problem.data))
    failures = 0
    for backend in backends:
        name, about = _named(case, backend)
        if reason := case.unsupported(backend):
            settings.file.add(PART, name, **about, unsupported=reason)
            continue
        try:
            tried = trace(problem, problem.state(), backend)
            figures = measured(case, problem, tried.compiled(), truth, settings)
        except Exception as error:  # one kernel that fails must not keep the others from being measured
            figures, tried = {"error": _first_line(error)}, None
        failures += "error" in figures
        choice = tried.choice if tried is not None else None
        settings.file.add(PART, name, **about, config=None if choice is None else asdict(choice.config), **figures)
    return failures


def tune_case(case: Case, backends: Sequence[Backend], settings: Settings, path: Path) -> int:
    """Measures a case's candidates and writes the fastest to `path`; returns on how many backends none worked."""
    problem = case.build()
    truth = jax.block_until_ready(jax.jit(problem.truth)(problem.data))
    failures = 0
    for backend in backends:
        if backend.name == "reference" or case.unsupported(backend) or not case.candidates(backend):
            continue
        name, about = _named(case, backend)
        best: dict[str, tuple[rows.Row, Choice]] = {}  # of each op that the case is made of
        candidates = case.candidates(backend)[: settings.candidates]
        pool = ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="compile")
        try:
            state = problem.state()
            tried = [_traced(problem, state, backend, config) for config in candidates]
            del state
            compiling = [pool.submit(one.compiled) if one is not None else None for one in tried]
            for one, future in zip(tried, compiling, strict=True):
                if one is None or future is None or one.choice is None or time.perf_counter() > settings.deadline:
                    continue
                try:
                    figures = measured(case, problem, future.result(), truth, settings)
                except Exception as error:
                    figures = {"error": _first_line(error)}
                config = asdict(one.choice.config)
                settings.file.add("tuning", f"{name}, {json.dumps(config)}", **about, config=config, **figures)
                op = one.choice.op
                if "error" not in figures and (op not in best or figures["median_us"] < best[op][0]["median_us"]):
                    best[op] = figures, one.choice
        finally:
            pool.shutdown(cancel_futures=True)
        failures += not best
        for figures, choice in best.values():
            settings.file.add(PART, name, **about, config=asdict(choice.config), tuned=True, **figures)
            facts = {"median_us": figures["median_us"], "case": case.name}
            store(path, tuning.row(choice.op, choice.key, choice.config, **facts))
    return failures


def store(path: Path, row: rows.Row) -> None:
    """Puts a tuned row into its file, in place of an older one for the same key."""
    old = json.loads(path.read_text()) if path.is_file() else []
    kept = [other for other in old if (other["op"], other["key"]) != (row["op"], row["key"])]
    lines = ",\n".join(json.dumps(each) for each in [*kept, row])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n")


def _named(case: Case, backend: Backend) -> tuple[str, rows.Row]:
    """The name of a row, and what it is about."""
    about = {"op": case.op, "backend": backend.name, "sizes": dict(case.sizes), "dtype": case.dtype}
    return f"{case.op} {case.name}, {backend.name}", about


def _traced(problem: Problem, state: Any, backend: Backend, config: Any) -> Attempt | None:
    """None for a candidate that this shape refuses."""
    try:
        return trace(problem, state, backend, config)
    except Exception as error:
        print(f"{config} passed over: {_first_line(error)}", flush=True)
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder of rows")
    parser.add_argument("--only", default="", help="ops, with commas between")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--tune", action="store_true", help="try the candidates, write the fastest")
    parser.add_argument("--quick", action="store_true", help="half the samples, and every other case of a kind")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to walk the code")
    args = parser.parse_args()
    began = time.perf_counter()
    device = jax.devices()[0]
    target = dispatch_target(device)
    if target.platform == "cpu" and not args.tiny:
        parser.error("JAX finds no GPU here; --tiny walks the code without one")
    settings = Settings(
        candidates=2 if args.tiny else None,
        deadline=began + args.budget,
        samples=3 if args.tiny else 10 if args.quick else 20,
        sample_seconds=0.0 if args.tiny else 0.005,
        ceilings=known(args.out, tiny=args.tiny),
        file=rows.open_rows(args.out),
    )
    tuned = args.out / "tuned.json" if args.tiny else tuning.path(target.kind)
    wanted = set(filter(None, args.only.split(",")))
    cases = [case for case in all_cases(tiny=args.tiny, quick=args.quick) if not wanted or case.op in wanted]
    if args.tune:
        cases = [case for case in cases if case.tune]
    failures = skipped = 0
    for case in cases:
        if time.perf_counter() > settings.deadline:
            skipped += 1
            print(f"no time left for {case.op} {case.name}", flush=True)
            continue
        backends = [Backend(name, target.kind, target.num_cores, args.tiny) for name in case.backends]
        try:
            if args.tune:
                failures += tune_case(case, backends, settings, tuned)
            else:
                failures += run_case(case, backends, settings)
        except Exception as error:  # its data, or its truth
            failures += 1
            settings.file.add(PART, f"{case.op} {case.name}", op=case.op, error=_first_line(error))
    print(f"{len(cases) - skipped} of {len(cases)} cases, {failures} failures")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
