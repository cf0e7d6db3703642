"""`python -m server` is the `jaxserve` command."""

from server.cli import app

app(prog_name="jaxserve")
