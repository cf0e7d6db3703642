"""`jaxserve chat`: what the model is shown, what survives an interrupt, what a pipe gets."""

from typer.testing import CliRunner

from jaxserve.errors import NumericalError, PromptTooLongError
from jaxserve.request import SamplingParams
from server.cli import app
from server.commands.chat import converse


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_each_turn_shows_the_model_the_whole_conversation(llm, typed) -> None:
    llm.answers = [["Hi", "!"], ["Four."]]
    typed(["hello", "", "2+2?"])
    converse(llm, SamplingParams(), "be brief", interactive=True)
    opening = {"role": "system", "content": "be brief"}
    assert llm.prompts == [
        [opening, user("hello")],
        [opening, user("hello"), assistant("Hi!"), user("2+2?")],
    ]


def test_reset_forgets_all_but_the_system_message(llm, typed) -> None:
    llm.answers = [["a"], ["b"]]
    typed(["one", "/reset", "two", "/quit", "never read"])
    converse(llm, SamplingParams(), "be brief", interactive=True)
    assert llm.prompts[1] == [{"role": "system", "content": "be brief"}, user("two")]
    assert len(llm.prompts) == 2


def test_interrupt_ends_the_answer_but_not_the_program(llm, typed, capsys) -> None:
    llm.answers = [["once", " upon", KeyboardInterrupt()], ["sure"]]
    typed(["a story", KeyboardInterrupt(), "go on"])
    converse(llm, SamplingParams(), interactive=True)
    assert llm.num_open == 0
    assert llm.prompts[1] == [user("a story"), assistant("once upon"), user("go on")]
    assert "once upon\n" in capsys.readouterr().out


def test_refused_turn_leaves_no_trace(llm, typed, capsys) -> None:
    llm.answers = [[PromptTooLongError("prompt of 9 tokens", "prompt", 9)], ["fine"]]
    typed(["far too long", "short"])
    converse(llm, SamplingParams(), interactive=True)
    assert llm.prompts[1] == [user("short")]
    assert "error: prompt of 9 tokens\n" in capsys.readouterr().err


def test_failed_answer_is_told_and_the_next_one_comes(llm, typed, capsys) -> None:
    llm.answers = [[NumericalError("NaN logits")], ["fine"]]
    typed(["one", "two"])
    converse(llm, SamplingParams(), interactive=True)
    assert llm.prompts[1] == [user("two")]
    captured = capsys.readouterr()
    assert "error: NaN logits" in captured.err
    assert "fine" in captured.out


def test_unknown_command_is_not_sent_to_the_model(llm, typed, capsys) -> None:
    typed(["/rest"])
    converse(llm, SamplingParams(), interactive=True)
    assert llm.prompts == []
    assert "/rest: no such command" in capsys.readouterr().err


def test_pipe_gets_the_answers_and_nothing_else(llm) -> None:
    llm.answers = [["one!"], ["two!"]]
    result = CliRunner().invoke(app, ["chat", "--max-tokens", "5"], input="1\n\n2\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "one!\ntwo!\n", "")
    assert llm.params[0].max_tokens == 5
    assert llm.closed


def test_interrupt_of_a_pipe_ends_the_program(llm) -> None:
    llm.answers = [["one", KeyboardInterrupt()], ["two"]]
    result = CliRunner().invoke(app, ["chat"], input="1\n2\n")
    assert (result.exit_code, len(llm.prompts)) == (130, 1)
