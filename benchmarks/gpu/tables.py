"""What the rows of a GPU run say: whether the goals are met, and the figures, as rows and columns of tables."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from gpu.rows import Row


class Table(NamedTuple):
    rows: list[Row]
    columns: Mapping[str, str]  # key -> heading


class Goal(NamedTuple):
    """A figure and what it shall be at least; value None = it was not measured."""

    name: str
    value: float | None
    least: float
    unit: str  # "%" or "×"

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        by = abs(self.value / self.least - 1)
        return f"met, {by:.0%} above" if self.value >= self.least else f"missed by {by:.0%}"


def goals(rows: list[Row]) -> list[Goal]:
    """What the project wants of a GPU; of several figures that a goal is about, the worst counts."""
    kernels = [row for row in rows if row["part"] == "kernels" and "median_us" in row]
    steps = [row for row in rows if row["part"] == "steps" and not row["label"] and "median_us" in row]
    found = []
    for model in ("Llama-3-8B", "Llama-2-13B"):
        name = f"paged_attention decode 64 x 2048, {model}, bfloat16, "
        best = max((row["copy_percent"] for row in kernels if row["name"].startswith(name)), default=None)
        found.append(Goal(f"decode attention, 64 rows x 2,048, {model}: of the copy ceiling", best, 85, "%"))
    for model in ("Llama-3-8B", "Llama-2-13B"):
        decodes = [row for row in steps if row["kind"] == "decode" and row["model"] == model and row["rows"] >= 64]
        worst = min((row["copy_percent"] for row in decodes), default=None)
        found.append(Goal(f"decode step, 64 rows or more, {model}: of the memory roofline", worst, 80, "%"))
    for model in ("Llama-3-8B", "Llama-2-13B"):
        fills = [row for row in steps if row["kind"] == "prefill" and row["model"] == model and row["tokens"] == 2048]
        worst = min((row["matmul_percent"] for row in fills), default=None)
        found.append(Goal(f"prefill of 2,048 tokens, {model}: of the matmul ceiling", worst, 50, "%"))
    output, both = _rates(rows, "output_tokens_per_s"), _rates(rows, "tokens_per_s")
    return [
        *found,
        Goal("(d) over (a), output tokens/s", _ratio(output, "d", "a"), 30, "×"),
        Goal("(e) over (d), prompt and output tokens/s", _ratio(both, "e", "d"), 1.5, "×"),
        Goal("(e) over (d2), output tokens/s", _ratio(output, "e", "d2"), 1.5, "×"),
    ]


def goal_table(rows: list[Row]) -> Table:
    shown = [
        {
            "goal": goal.name,
            "least": f"{goal.least:g}{goal.unit}",
            "value": "" if goal.value is None else f"{goal.value:,.1f}{goal.unit}",
            "verdict": goal.verdict,
        }
        for goal in goals(rows)
    ]
    return Table(shown, {"goal": "goal", "least": "at least", "value": "measured", "verdict": ""})


def ceiling_table(rows: list[Row]) -> Table:
    columns = {"name": "", "gb_s": "GB/s", "tflop_s": "TFLOP/s", "median_us": "µs", "p10_us": "p10", "p90_us": "p90"}
    return Table([row for row in rows if row["part"] == "ceilings"], columns)


def kernel_table(rows: list[Row]) -> Table:
    shown = []
    for row in rows:
        if row["part"] != "kernels" or "unsupported" in row:
            continue
        case = row["name"].removeprefix(row["op"]).removesuffix(f", {row.get('backend')}").strip()
        config = " ".join(f"{key}={value}" for key, value in (row.get("config") or {}).items())
        error = f"{row['rel_error']:.1e}" if "rel_error" in row else ""
        told = {"case": f"{row['op']}: {case}", "config": config, "off": error, "wrong": row.get("error")}
        shown.append({**row, **told})
    columns = {
        "case": "case",
        "backend": "backend",
        "config": "launched with",
        "off": "error",
        "median_us": "µs",
        "p10_us": "p10",
        "p90_us": "p90",
        "gb_s": "GB/s",
        "copy_percent": "% of copy",
        "tflop_s": "TFLOP/s",
        "matmul_percent": "% of matmul",
        "compile_seconds": "compile s",
        "wrong": "",
    }
    return Table(shown, columns)


def decode_table(rows: list[Row]) -> Table:
    columns = {
        "model": "model",
        "way": "",
        "rows": "rows",
        "context": "context",
        "median_us": "µs a step",
        "p10_us": "p10",
        "p90_us": "p90",
        "host_us": "host µs",
        "tokens_per_s": "tokens/s",
        "gb_s": "GB/s",
        "copy_percent": "% of copy",
        "matmul_percent": "% of matmul",
        "skipped": "",
    }
    decodes = [row for row in rows if row["part"] == "steps" and row["kind"] == "decode"]
    ways = (
        {**row, "way": ", ".join(filter(None, ("sampled" if "sampled" in row["name"] else "", row["label"])))}
        for row in decodes
    )
    return Table(sorted(ways, key=lambda row: (row["model"], row["way"], row["context"], row["rows"])), columns)


def prefill_table(rows: list[Row]) -> Table:
    columns = {
        "model": "model",
        "tokens": "tokens",
        "median_us": "µs",
        "p10_us": "p10",
        "p90_us": "p90",
        "tokens_per_s": "tokens/s",
        "tflop_s": "TFLOP/s",
        "matmul_percent": "% of matmul",
    }
    fills = [row for row in rows if row["part"] == "steps" and row["kind"] == "prefill"]
    return Table(sorted(fills, key=lambda row: (row["model"], row["tokens"])), columns)


def memory_table(rows: list[Row]) -> Table:
    gib = {
        "weight_bytes": "weights",
        "pool_bytes": "KV pool",
        "step_bytes": "largest step",
        "peak_bytes": "**peak**",
        "limit_bytes": "of",
    }
    shown = [
        {**row, **{key: None if row[key] is None else round(row[key] / 2**30, 2) for key in gib}}
        for row in rows
        if row["part"] == "steps" and row["kind"] == "memory"
    ]
    return Table(shown, {"model": "model", "label": "", **{key: f"{heading}, GiB" for key, heading in gib.items()}})


def comparison_table(rows: list[Row]) -> Table:
    rates = _rates(rows, "output_tokens_per_s")
    shown = [
        {**row, "times": None if (ratio := _ratio(rates, row["name"], "a")) is None else f"{ratio:.1f}×"}
        for row in rows
        if row["part"] == "comparison"
    ]
    columns = {
        "name": "",
        "engine": "engine",
        "requests": "requests done",
        "of_requests": "of",
        "prompt_tokens": "prompt tokens",
        "cached_prompt_tokens": "of them cached",
        "output_tokens": "output tokens",
        "seconds": "s",
        "output_tokens_per_s": "output tokens/s",
        "times": "times (a)",
        "tokens_per_s": "all tokens/s",
        "error": "",
    }
    return Table(sorted(shown, key=lambda row: row["name"]), columns)


TABLES: Mapping[str, tuple[Callable[[list[Row]], Table], ...]] = {
    "gpu_goals": (goal_table, ceiling_table),
    "gpu_kernels": (kernel_table,),
    "gpu_steps": (decode_table, prefill_table, memory_table),
    "gpu_comparison": (comparison_table,),
}


def plot(rows: Iterable[Row], path: Path) -> bool:
    """Writes an SVG of the bandwidth of decode attention by rows and context; False where nothing was measured.

    Raises ImportError without matplotlib.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    ceiling = None
    for row in rows:
        if row["part"] == "ceilings" and row["name"] == "copy":
            ceiling = row["gb_s"]
        if row["part"] == "kernels" and " decode " in row["name"] and row.get("gb_s") and row["backend"] != "reference":
            case = row["name"].partition(", ")[2]
            label = f"{case.removesuffix(', ' + row['backend'])}, context {row['sizes']['context']:,}"
            points.setdefault(label, []).append((row["sizes"]["rows"], row["gb_s"]))
    if not points:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for label, line in sorted(points.items()):
        axes.plot(*zip(*sorted(line), strict=True), marker="o", label=label)
    if ceiling is not None:
        axes.axhline(ceiling, color="black", linestyle="--", label="copy")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rows", ylabel="GB/s", title="Decode attention")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    return True


def _rates(rows: list[Row], key: str) -> dict[str, float]:
    return {row["name"]: row[key] for row in rows if row["part"] == "comparison" and key in row}


def _ratio(rates: Mapping[str, float], upper: str, lower: str) -> float | None:
    return rates[upper] / rates[lower] if upper in rates and lower in rates else None
