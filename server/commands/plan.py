"""`jaxserve plan MODEL`: a model and settings go in, the memory table comes out; no weights are loaded."""

from typing import Annotated, Any

import typer

from server.commands.flags import command


@command
def plan(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face directory, .gguf file or hub id; without it, the default model.")
    ] = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Show what a model would need, and how many sequences fit, without loading it."""
    from jaxserve.config import EngineConfig

    config = EngineConfig.from_options(model=model, **engine)

    from rich.console import Console

    from jaxserve.engine.build import plan_memory_for

    Console().print(plan_memory_for(config).table())
