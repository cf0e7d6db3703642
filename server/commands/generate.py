"""`jaxserve generate "…"`: one prompt goes in, its continuation comes out on standard output."""

import sys
from typing import Annotated, Any

import typer

from server.commands.flags import command
from server.commands.session import Answer, ConcurrencyFlag, open_llm, sampling_params, stream_to_stdout

MAX_TOKENS = 256


@command
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print text as it is generated.")] = True,
    max_num_seqs: ConcurrencyFlag = 1,
    *,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Continue a prompt. The text goes to standard output, everything else to standard error."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with open_llm({"max_num_seqs": max_num_seqs, **engine}, sampling) as llm:
        params = sampling_params(llm, sampling, MAX_TOKENS)
        if not stream:
            [output] = llm.generate(text, params, show_progress=False)
            typer.echo(output.outputs[0].text)
            return
        answer = Answer()
        try:
            stream_to_stdout(llm, text, params, answer)
        finally:
            typer.echo()
        if sys.stdout.isatty():
            typer.secho(answer.summary(), dim=True, err=True)
