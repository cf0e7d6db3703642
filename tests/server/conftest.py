"""An LLM that answers from a script, so that the commands' own laws are tested without an engine."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import jaxserve
from jaxserve.request import SamplingParams


@dataclass
class Delta:
    text: str
    token_ids: list[int]
    index: int = 0
    finish_reason: str | None = None


@dataclass
class ScriptedLLM:
    """answers: one list of text pieces per call; an exception among them is raised in its place."""

    answers: list[list[Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.2})  # what the checkpoint names
    prompts: list[Any] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    num_open: int = 0  # streams begun and not closed
    closed: bool = False

    def __enter__(self) -> "ScriptedLLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        return SamplingParams(**self.defaults | overrides)

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[Delta]:
        self.prompts.append(prompt)
        self.params.append(params)
        self.num_open += 1
        try:
            for piece in self.answers.pop(0):
                if isinstance(piece, BaseException):
                    raise piece
                yield Delta(piece, [1])
        finally:
            self.num_open -= 1


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> ScriptedLLM:
    """What `jaxserve.LLM(**options)` gives the commands in this test."""
    scripted = ScriptedLLM()

    def build(**options: Any) -> ScriptedLLM:
        scripted.options = options
        return scripted

    monkeypatch.setattr(jaxserve, "LLM", build, raising=False)
    return scripted


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """typed(lines): what a person types at input(); a KeyboardInterrupt among them is raised, the end is Ctrl-D."""

    def install(lines: list[Any]) -> None:
        left = iter(lines)

        def read(_prompt: str = "") -> str:
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setitem(sys.modules, "readline", None)  # it would touch the terminal of whoever runs the tests

    return install
