"""`jaxserve chat`: lines from the keyboard or a pipe go in, streamed answers come out."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.errors import EngineError, InvalidRequestError
from jaxserve.request import SamplingParams
from server.commands.flags import command
from server.commands.session import Answer, ConcurrencyFlag, open_llm, sampling_params, stream_to_stdout

if TYPE_CHECKING:
    from jaxserve import LLM

MAX_TOKENS = 1024
HELP = "/reset forgets the conversation · /quit or Ctrl-D leaves · Ctrl-C stops an answer"


@command
def chat(
    system: Annotated[str | None, typer.Option("--system", help="Instructions the model sees first.")] = None,
    max_num_seqs: ConcurrencyFlag = 1,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Talk with a model. From a pipe, every line is one turn and only the answers are printed."""
    with open_llm({"max_num_seqs": max_num_seqs, **engine}, sampling) as llm:
        params = sampling_params(llm, sampling, MAX_TOKENS)
        converse(llm, params, system, interactive=sys.stdin.isatty())


def converse(llm: "LLM", params: SamplingParams, system: str | None = None, *, interactive: bool) -> None:
    """Read lines until /quit or the end of the input, and answer each with the whole conversation as context.

    Ctrl-C during an answer ends that answer only; what was said so far stays in the conversation. A turn that is
    refused (too long, say) leaves no trace in it.
    """
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and history

        _dim(HELP)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while (line := _read(interactive)) is not None:
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(opening)
            if interactive:
                _dim("the conversation starts anew")
        elif line.startswith("/"):
            typer.secho(f"{line.split()[0]}: no such command; {HELP}", err=True)
        elif line:
            messages = _turn(llm, params, [*messages, {"role": "user", "content": line}], interactive)


def _turn(
    llm: "LLM", params: SamplingParams, messages: list[dict[str, str]], interactive: bool
) -> list[dict[str, str]]:
    """Stream the answer to the last message. Returns the conversation as it stands then."""
    answer = Answer()
    try:
        stream_to_stdout(llm, messages, params, answer)
    except KeyboardInterrupt:
        if not interactive:
            raise
    except InvalidRequestError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        typer.secho("that turn was not added; /reset starts anew", dim=True, err=True)
        return messages[:-1]
    except EngineError as error:
        typer.secho(f"\nerror: {error}", fg="red", err=True)
    typer.echo()
    if interactive:
        _dim(answer.summary())
    if not answer.text:
        return messages[:-1]
    return [*messages, {"role": "assistant", "content": answer.text}]


def _read(interactive: bool) -> str | None:
    """The next line without its blanks at either end; None at the end of the input."""
    if not interactive:
        line = sys.stdin.readline()
        return line.strip() if line else None
    while True:
        try:
            return input("> ").strip()
        except EOFError:
            typer.echo()
            return None
        except KeyboardInterrupt:
            typer.echo()
            _dim(HELP)


def _dim(text: str) -> None:
    typer.secho(text, dim=True)
