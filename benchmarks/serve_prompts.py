"""The workloads of serve.py: lengths from workloads/*.json and English from workloads/text.txt in, prompts out.

text.txt: the Gettysburg Address, the Declaration of Independence and parts of Lincoln's second inaugural address, all
in the public domain. Prompts are windows into its tokens that start at different ones, so that none begins like another
unless the workload says so.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "workloads"
NAMES = ("w1", "w2", "w3", "w4")
SEED = 20_260_101
QUICK = 8  # a quick workload has so many times fewer requests and tokens


@dataclass(frozen=True, kw_only=True)
class Workload:
    """requests: (prompt tokens, output tokens) of each. sequential: one after the other, else all at once."""

    name: str
    about: str
    sequential: bool
    shared_prefix: int  # tokens that all prompts begin with
    requests: tuple[tuple[int, int], ...]

    @property
    def output_tokens(self) -> int:
        return sum(output for _, output in self.requests)


def workload(name: str, *, quick: bool = False) -> Workload:
    """One of NAMES; quick: the same in small, for a tiny model."""
    told = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    requests, prefix = [tuple(pair) for pair in told["requests"]], told["shared_prefix"]
    if quick:
        few = requests[: max(2, len(requests) // QUICK)]
        requests, prefix = [(max(2, a // QUICK), max(2, b // QUICK)) for a, b in few], prefix // QUICK
    return Workload(
        name=name,
        about=told["about"],
        sequential=told["sequential"],
        shared_prefix=prefix,
        requests=tuple(requests),
    )


def paragraphs() -> list[str]:
    """The text, in pieces that any model's context holds."""
    return (FOLDER / "text.txt").read_text(encoding="utf-8").splitlines(keepends=True)


def prompts(work: Workload, tokens: Sequence[int]) -> list[list[int]]:
    """One per request, the same on every call. tokens: of the text, read in a ring.

    Raises ValueError for a text too short to begin every prompt at a token of its own.
    """
    starts = random.Random(f"{SEED} {work.name}").sample(range(len(tokens)), len(work.requests) + 1)
    prefix = _window(tokens, starts.pop(), work.shared_prefix)
    return [
        prefix + _window(tokens, start, length - work.shared_prefix)
        for start, (length, _) in zip(starts, work.requests, strict=True)
    ]


def _window(tokens: Sequence[int], start: int, length: int) -> list[int]:
    return [tokens[(start + i) % len(tokens)] for i in range(length)]
