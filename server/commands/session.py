"""What `generate` and `chat` share: flags go in, an engine and a stream of text on standard output come out."""

import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.request import SamplingParams

if TYPE_CHECKING:
    from jaxserve import LLM

# One conversation needs one row, and a shorter ladder compiles in a fraction of the time.
ConcurrencyFlag = Annotated[int, typer.Option(help="Sequences that run at once.")]

# Small models ramble at temperature 1, which is what a checkpoint without sampling defaults would get.
MILD = {"temperature": 0.3, "top_p": 0.9}


def open_llm(engine: dict[str, Any], sampling: dict[str, Any]) -> "LLM":
    """The engine for the flags that were given. Refuses impossible sampling values before it loads anything."""
    SamplingParams(**sampling)
    import jaxserve

    options: dict[str, Any] = {"show_progress": sys.stderr.isatty(), **engine}
    return jaxserve.LLM(**options)


def sampling_params(llm: "LLM", sampling: dict[str, Any], max_tokens: int) -> SamplingParams:
    """The flags, over the checkpoint's own defaults, over MILD if it names none."""
    named = llm.default_sampling_params() != SamplingParams()
    return llm.default_sampling_params(**{"max_tokens": max_tokens} | ({} if named else MILD) | sampling)


@dataclass
class Answer:
    """One streamed answer. Times are time.perf_counter() seconds."""

    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float | None = None
    text: str = ""
    num_tokens: int = 0

    def summary(self) -> str:
        """Tokens, tokens/s after the first, and how long that one took."""
        if self.first is None or self.last is None:
            return "no tokens"
        parts = [f"{self.num_tokens} tokens"]
        if self.num_tokens > 1 and self.last > self.first:
            parts.append(f"{(self.num_tokens - 1) / (self.last - self.first):.1f} tokens/s")
        return " · ".join([*parts, f"first after {self.first - self.started:.2f} s"])


def stream_to_stdout(llm: "LLM", prompt: Any, params: SamplingParams, answer: Answer) -> None:
    """Print text as it arrives and note it in `answer`, which holds what was printed even if this is interrupted."""
    with closing(llm.stream(prompt, params)) as deltas:
        for delta in deltas:
            answer.last = time.perf_counter()
            answer.first = answer.first or answer.last
            answer.num_tokens += len(delta.token_ids)
            answer.text += delta.text
            sys.stdout.write(delta.text)
            sys.stdout.flush()
