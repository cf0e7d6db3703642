"""Sixteen chat requests of different lengths, answered at once by a real model on this machine.

    python examples/demo.py [--model PATH_OR_HUB_ID]

Eight run at a time; as soon as one ends the next takes its row, which is what continuous batching means. The greedy
ones give the same answer on every run, and so do the sampled ones, since each has a seed.
"""

import argparse
import time
from typing import NamedTuple

from rich.console import Console, Group
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

import jaxserve

SHOWN_LINES = 5
SYSTEM = "You are a helpful assistant. Answer briefly and in plain words."


class Ask(NamedTuple):
    question: str
    max_tokens: int
    seed: int | None = None  # None = greedy


QUESTIONS = [
    Ask("What is the capital of France?", 16),
    Ask("Why is the sky blue?", 96),
    Ask("Write a haiku about the sea.", 40, seed=1),
    Ask("Name three primary colours.", 24),
    Ask("How do I boil an egg so that the yolk stays soft?", 128),
    Ask("Translate 'good morning' into French.", 16),
    Ask("Tell me a very short story about a lighthouse keeper and a whale.", 160, seed=2),
    Ask("Which planet is the largest in the Solar System?", 32),
    Ask("Explain photosynthesis to a ten-year-old.", 112),
    Ask("Give me two tips for learning to play the guitar.", 96, seed=3),
    Ask("What is 12 + 30?", 16),
    Ask("Write a Python function that returns the larger of two numbers.", 96),
    Ask("Suggest a name for a small black cat.", 24, seed=4),
    Ask("What does a compiler do?", 80),
    Ask(
        "My flight leaves at 9 in the morning, the train to the airport takes 40 minutes, and I want to be there two "
        "hours early. What should I do tonight so that tomorrow goes well?",
        144,
    ),
    Ask("Who wrote 'Romeo and Juliet'?", 24),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Sixteen chat requests, answered at once.")
    parser.add_argument("--model", help="directory, .gguf file or hub id; without it, SmolLM2-135M-Instruct")
    model = parser.parse_args().model
    console = Console()
    console.print(Rule("jaxserve demo: 16 chat requests, 8 at a time", style="cyan"))
    console.print(
        "The first start compiles for a minute or two; later starts find the programs in the cache.", style="dim"
    )
    try:
        started = time.perf_counter()
        with jaxserve.LLM(model, max_num_seqs=8, max_num_batched_tokens=128, max_model_len=1024) as llm:
            console.print(f"ready after {time.perf_counter() - started:.1f} s", style="dim")
            run(llm, console)
    except jaxserve.errors.JaxserveError as error:
        raise SystemExit(f"error: {error}") from None


def run(llm: jaxserve.LLM, console: Console) -> None:
    """Ask everything, then print every answer and what it took."""
    conversations = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ask.question}] for ask in QUESTIONS
    ]
    started = time.perf_counter()
    outputs = llm.chat(conversations, [sampling(llm, ask) for ask in QUESTIONS])
    seconds = time.perf_counter() - started
    for ask, output in zip(QUESTIONS, outputs, strict=True):
        console.print(answer(ask, output, console.width))
    console.print()
    console.print(summary(llm, outputs, seconds))


def sampling(llm: jaxserve.LLM, ask: Ask) -> jaxserve.SamplingParams:
    if ask.seed is None:
        return llm.default_sampling_params(max_tokens=ask.max_tokens, temperature=0.0)
    return llm.default_sampling_params(max_tokens=ask.max_tokens, temperature=0.7, top_p=0.9, seed=ask.seed)


def answer(ask: Ask, output: jaxserve.RequestOutput, width: int) -> Group:
    """One question, its answer cut to a few lines, and how it was made."""
    sample = output.outputs[0]
    lines = list(Text(sample.text.strip()).wrap(Console(width=width - 4), width - 4))
    shown = lines if len(lines) <= SHOWN_LINES else lines[: SHOWN_LINES - 1]
    notes = [f"{len(sample.token_ids)} tokens", "greedy" if ask.seed is None else f"sampled, seed {ask.seed}"]
    if len(shown) < len(lines):
        notes.insert(0, f"… {len(lines) - len(shown)} more lines")
    if sample.finish_reason == "length":
        notes.append(f"ended by max_tokens={ask.max_tokens}")
    body = Text("\n").join([*shown, Text(" · ".join(notes), style="dim")])
    return Group(Text(f"\n● {ask.question}", style="bold cyan"), Padding(body, (0, 2)))


def summary(llm: jaxserve.LLM, outputs: list[jaxserve.RequestOutput], seconds: float) -> Table:
    """What the run took, in numbers."""
    stats = llm.stats()
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    cached_tokens = sum(output.num_cached_tokens for output in outputs)
    output_tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    waits = sorted(wait for output in outputs if (wait := output.metrics.time_to_first_token) is not None)
    table = Table(title="What it took", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("prompt tokens", str(prompt_tokens), f"{cached_tokens} of them from the prefix cache")
    table.add_row("output tokens", str(output_tokens), f"in {stats.steps} steps")
    table.add_row("wall time", f"{seconds:.2f} s", f"first token after {waits[len(waits) // 2]:.2f} s (median)")
    table.add_row("output tokens/s", f"{output_tokens / seconds:.1f}", "all requests together")
    table.add_row("mean batch occupancy", f"{stats.mean_batch_occupancy:.0%}", f"{stats.mean_rows:.1f} rows a step")
    table.add_row(
        "peak KV use",
        f"{stats.peak_pages_used} pages",
        f"{stats.peak_pages_used / stats.pages_total:.1%} of {stats.pages_total:,}",
    )
    table.add_row("preemptions", str(stats.preemptions), "")
    return table


if __name__ == "__main__":
    main()
