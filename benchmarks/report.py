"""Benchmark results: what a run writes down about its machine, and results/*.json as the tables of README.md.

    python benchmarks/report.py            # rewrite the tables
    python benchmarks/report.py --check    # fail if README.md does not show the results
    python benchmarks/report.py --gpu DIR  # print the tables of a GPU run and draw its plot, beside its rows

A result is {"benchmark", "environment", "settings", "rows"}; one file per benchmark and machine. A GPU run instead is
lines of rows, results/gpu/*.jsonl (see gpu/rows.py).
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu import tables as gpu_tables
from gpu.rows import Row, read

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
RESULTS = HERE / "results"
PLOT = RESULTS / "gpu" / "decode.svg"
PACKAGES = ("jaxserve", "jax", "jaxlib", "numpy", "transformers", "torch")

Result = dict[str, Any]


def environment(device: str | None = None, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Where and when: device, CPU, cores, package versions, commit, load average at this moment.

    device: what the work ran on, where that was another process; None = what JAX finds here.
    """
    if device is None:
        import jax

        device = jax.devices()[0].device_kind
    return {
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name)) is not None},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def save(result: Result, path: Path) -> None:
    """Writes one result, a row of its table a line."""
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in result["rows"])
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def render(readme: str, results: Sequence[Result]) -> str:
    """README.md with every `<!-- NAME:begin -->` .. `<!-- NAME:end -->` filled from the results of that name."""
    for name in sorted({result["benchmark"] for result in results} | set(TABLES)):
        if name not in TABLES:
            raise SystemExit(f"benchmarks/results holds a result of {name!r}; there are tables for {sorted(TABLES)}")
        found = [f"{caption(result)}\n\n{TABLES[name](result)}" for result in results if result["benchmark"] == name]
        readme = _fill(readme, name, "\n\n".join(found) or "No results yet.")
    return readme


def render_gpu(readme: str, rows: list[Row]) -> str:
    """README.md with the tables of the GPU runs in their places; one set of them for each device."""
    devices = list(dict.fromkeys(row["device"] for row in rows))
    for name in gpu_tables.TABLES:
        parts = [gpu_text(name, [row for row in rows if row["device"] == device]) for device in devices]
        if name == "gpu_kernels" and any(parts) and PLOT.is_file():
            parts.insert(0, f"![bandwidth of decode attention by rows and context]({PLOT.relative_to(HERE)})")
        readme = _fill(readme, name, "\n\n".join(filter(None, parts)) or "No results yet.")
    return readme


def gpu_text(name: str, rows: list[Row]) -> str:
    """The tables of that name over the rows of one device, and what they were measured with; "" if there are none."""
    made = [table(rows) for table in gpu_tables.TABLES[name]]
    if not rows or not any(table.rows for table in made):
        return ""
    last = rows[-1]
    versions = [f"{package} {version}" for package, version in last["versions"].items()]
    driver = f"driver {last['driver']}" if last["driver"] else "no driver"
    where = " · ".join([last["device"], driver, *versions, f"commit {last['commit']}", last["date"]])
    return "\n\n".join([where, *(markdown(table.rows, used(table)) for table in made if table.rows)])


def used(table: gpu_tables.Table) -> dict[str, str]:
    """The columns that some row has a value in."""
    return {key: name for key, name in table.columns.items() if any(row.get(key) is not None for row in table.rows)}


def report_gpu(folder: Path) -> None:
    """Prints all tables of a run, and draws its plot where matplotlib is installed."""
    rows = read(folder.glob("*.jsonl"))
    for name in gpu_tables.TABLES:
        for device in dict.fromkeys(row["device"] for row in rows):
            print(f"\n{name}\n\n{gpu_text(name, [row for row in rows if row['device'] == device])}")
    try:
        if gpu_tables.plot(rows, folder / PLOT.name):
            print(f"drew {folder / PLOT.name}")
    except ImportError:
        print("no plot: matplotlib is not installed")


def _fill(readme: str, name: str, body: str) -> str:
    """README.md with `body` between the two marks of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise SystemExit(f"benchmarks/README.md must hold {begin} and {end} once each")
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{body}\n\n{end}{after}"


def caption(result: Result) -> str:
    """The line above a table: what it was measured on, and how."""
    where, settings = result["environment"], result["settings"]
    versions = where["versions"]
    named = [f"{name} {versions[name]}" for name in ("jax", "torch", "transformers") if name in versions]
    device = where["cpu"] if where["device"] == "cpu" else where["device"]
    parts = [
        f"{device}, {where['cores']} cores",
        settings["dtype"],
        *named,
        f"commit {where['commit']}",
        where["date"],
        f"load average {where['load_average']}" + (f" to {end}" if (end := where.get("load_average_end")) else ""),
    ]
    return " · ".join(parts)


def step_table(result: Result) -> str:
    columns = {
        "rows": "rows",
        "plan_us": "plan",
        "update_us": "update",
        "pack_us": "pack",
        "launch_us": "launch",
        "collect_us": "collect",
        "other_us": "other",
        "host_us": "**host, in all**",
        "wait_us": "device wait",
        "step_us": "step",
        "host_us_per_row": "host a row",
    }
    return f"Overlap {result['settings']['overlap']}, µs a step:\n\n{markdown(result['rows'], columns)}"


def offline_table(result: Result) -> str:
    columns = {
        "requests": "requests",
        "engine": "engine",
        "dtype": "dtype",
        "prompt_tokens_per_s": "prompt tokens/s",
        "output_tokens_per_s": "output tokens/s",
        "prompt_ratio": "prompt: jaxserve is",
        "output_ratio": "output: jaxserve is",
    }
    rows = [
        {**row, **{key: f"{row[key]:.2f}×" for key in ("prompt_ratio", "output_ratio") if row.get(key) is not None}}
        for row in result["rows"]
    ]
    return markdown(rows, columns)


def serve_table(result: Result) -> str:
    rows = [{**row, **({"ratio": f"{row['ratio']:.1%}"} if "ratio" in row else {})} for row in result["rows"]]
    memory = [
        f"{role} {size['now']:,.0f} (at its highest {size['peak']:,.0f})" for role, size in result["memory_mib"].items()
    ]
    told = f"\n\nResident MiB: {'; '.join(memory)}." if memory else ""
    return markdown(rows, serve_columns(result)) + told


def serve_columns(result: Result) -> dict[str, str]:
    """Key -> heading, of what was measured."""
    columns = {
        "workload": "",
        "protocol": "",
        "ttft_p50_ms": "TTFT p50 ms",
        "ttft_p99_ms": "p99",
        "itl_p50_ms": "ITL p50 ms",
        "itl_p99_ms": "p99",
        "tokens_per_s": "output tokens/s",
        "in_process_tokens_per_s": "in-process",
        "ratio": "served is",
        "frontend_us_per_token": "front end, CPU µs a token",
        "server_us_per_token": "server, CPU µs a token",
        "client_us_per_token": "client",
        "core_cores": "core, cores",
    }
    return {key: heading for key, heading in columns.items() if any(key in row for row in result["rows"])}


TABLES: Mapping[str, Callable[[Result], str]] = {"offline": offline_table, "serve": serve_table, "step": step_table}


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table of the named columns; numbers to the right, a missing value empty."""
    lines = [
        "| " + " | ".join(columns.values()) + " |",
        "|" + "|".join("---:" if _numeric(rows, key) else "---" for key in columns) + "|",
    ]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def _numeric(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether the first value of a column is a number."""
    return isinstance(next((row[key] for row in rows if row.get(key) is not None), None), int | float)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Short hash of HEAD, with + where code differs from it; "unknown" outside a checkout."""
    try:
        git = ["git", "-C", str(HERE)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        code = [":/jaxserve", ":/pallas_kernels", ":/server", ":/benchmarks/*.py"]
        status = subprocess.run(
            [*git, "status", "--porcelain", "--", *code], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the tables are stale")
    parser.add_argument("--gpu", type=Path, help="folder of the rows of a GPU run, to print")
    args = parser.parse_args()
    if args.gpu is not None:
        report_gpu(args.gpu)
        return
    check = args.check
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    old = README.read_text(encoding="utf-8")
    new = render_gpu(render(old, results), read((RESULTS / "gpu").glob("*.jsonl")))
    if check and new != old:
        raise SystemExit("benchmarks/README.md does not show benchmarks/results: run python benchmarks/report.py")
    if not check:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
