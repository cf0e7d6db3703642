"""`jaxserve serve [MODEL]`: settings come from flags, environment and file; REST and gRPC are served until a signal."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.commands.flags import DEFAULTS, command

if TYPE_CHECKING:
    from server.settings import ServeConfig
    from server.settings_sources import Resolved
    from server.supervision.ports import Ports


@command
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Hugging Face directory, .gguf file or hub id; without it, the default model.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="YAML file of settings.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show every setting, where it comes from, and the memory plan; then stop.")
    ] = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Serve a model over gRPC and the OpenAI REST API.

    Every setting can also come from the environment (JAXSERVE_PORT=9000) or a YAML file (port: 9000). Flags come
    before the environment, and that before the file.
    """
    from server.settings_sources import resolve

    given = {name: value for name, value in {"model": model, **settings}.items() if value is not None}
    resolved = resolve(given, config)
    if dry_run:
        show_plan(resolved)
        return
    from server.observability.logs import configure_logging
    from server.supervision.ports import reserve

    configure_logging(resolved.config.server, "supervisor")
    with reserve(resolved.config.server) as ports:
        if resolved.config.server.in_process:
            _serve_in_process(resolved.config, ports)
            return
        from server.supervisor import supervise

        outcome = supervise(resolved.config, ports)
    if outcome.error is not None:
        typer.secho(f"error: {' '.join(outcome.error.split())}", fg="red", err=True)
    raise typer.Exit(outcome.exit_code)


def show_plan(resolved: "Resolved") -> None:
    """The settings table first: it comes at once and needs no model."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", "value", "from", title="Settings", title_justify="left")
    for name, value, origin in resolved.rows():
        style = "dim" if origin == "default" else ""
        meaning = DEFAULTS.get(name, value) if value == "–" else value
        table.add_row(Text(name, style), Text(meaning, style), Text(origin, style))
    console = Console(soft_wrap=not sys.stdout.isatty())
    console.print(table)

    from jaxserve.engine.build import plan_memory_for

    console.print(plan_memory_for(resolved.config.engine).table())


def _serve_in_process(config: "ServeConfig", ports: "Ports") -> None:
    from server.frontend.process import run_in_process
    from server.supervision.banner import announce

    run_in_process(config, ports, lambda frontend, bound: announce(config.server, bound, frontend.model_names[0]))
