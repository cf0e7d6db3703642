"""The `jaxserve` command: arguments go in, one file of `server/commands` answers each sub-command.

Nothing here or at the top of a command's file imports JAX or transformers, so `--help` answers at once.
"""

from typing import Annotated

import typer

import jaxserve
from server.commands.chat import chat
from server.commands.doctor import doctor
from server.commands.generate import generate
from server.commands.plan import plan
from server.commands.serve import serve

app = typer.Typer(
    name="jaxserve",
    help="LLM inference in JAX. Without --model, commands use SmolLM2-135M-Instruct where it is installed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (serve, generate, chat, plan, doctor):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jaxserve {jaxserve.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
